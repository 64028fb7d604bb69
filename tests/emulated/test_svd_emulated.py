"""The CUDA singular value decomposition, by the tests of the op, on the emulator: half a warp a matrix up to 16, a warp
up to 32, then a block in shared memory, then a block in the memory of the vectors."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import spectra
import test_svd as op
import torch

import fastlora as fl

IN_PLACE = 1500  # bytes of shared memory that hold no matrix of more than 32 rows
FORMS = {
    "half warp": (11, 6, emulation.SHARED_LIMIT),
    "half warp, wide": (6, 11, emulation.SHARED_LIMIT),
    "warp": (17, 6, emulation.SHARED_LIMIT),
    "shared": (35, 7, emulation.SHARED_LIMIT),
    "in place": (35, 7, IN_PLACE),
    "in place, wide": (7, 35, IN_PLACE),
}
every_form = pytest.mark.parametrize(("p", "q", "shared_limit"), FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
SMALL = [(1, 1), (1, 7), (7, 1), (2, 5), (9, 4), (5, 16), (16, 16), (17, 9), (35, 7), (7, 35), (3, 130)]
LARGER = [(32, 32), (24, 31), (33, 20), (20, 33)]


@every_dtype
@pytest.mark.parametrize(("p", "q"), SMALL)
def test_ratios(on_emulator: None, p: int, q: int, dtype: torch.dtype) -> None:
    op.test_ratios(p, q, dtype, batch=2)


@every_dtype
@pytest.mark.parametrize(("p", "q"), [(35, 7), (7, 35), (33, 2)])
def test_ratios_in_place(on_emulator: None, emulator: Any, p: int, q: int, dtype: torch.dtype) -> None:
    emulator.set_shared_limit(IN_PLACE)
    op.test_ratios(p, q, dtype, batch=2)


@every_dtype
@pytest.mark.parametrize(("p", "q"), LARGER)
def test_ratios_of_larger_matrices(emulator: Any, p: int, q: int, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator, 3):
        op.test_ratios(p, q, dtype, batch=1)


@every_dtype
@pytest.mark.parametrize(("p", "q"), [(3, 5), (8, 8), (33, 5)])
def test_same_bits_in_any_batch(emulator: Any, p: int, q: int, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator):
        op.test_same_bits_in_any_batch(p, q, dtype)


@every_dtype
@pytest.mark.parametrize(("p", "q"), [(9, 6), (35, 7)])
def test_same_bits_in_every_schedule_and_form(emulator: Any, p: int, q: int, dtype: torch.dtype) -> None:
    a = torch.cat([a for _, a in spectra.rectangular(p, q, dtype, batch=1)])
    results = []
    for schedule in (0, 1, 2):
        for limit in {emulation.SHARED_LIMIT, IN_PLACE if p > 32 else emulation.SHARED_LIMIT}:
            with emulation.emulated(emulator, schedule, limit):
                results.append(fl.ops.svd(a))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("p", "q"), [(9, 9), (7, 12), (6, 34)])
def test_signs(emulator: Any, p: int, q: int) -> None:
    with emulation.emulated(emulator, 1):
        op.test_signs(p, q)


@every_dtype
def test_small_values_of_graded_columns_are_relatively_accurate(emulator: Any, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator):
        op.test_small_values_of_graded_columns_are_relatively_accurate(dtype, 12)


@every_dtype
@every_form
def test_non_finite_matrices_stay_alone(emulator: Any, p: int, q: int, shared_limit: int, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator, 1, shared_limit):
        op.test_non_finite_matrices_stay_alone(dtype, p, q)


@every_dtype
def test_ends_of_the_range(on_emulator: None, dtype: torch.dtype) -> None:
    op.test_ends_of_the_range(dtype)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 2), (3, 2, 0), (2, 0, 5, 5)])
def test_empty(on_emulator: None, shape: tuple[int, ...]) -> None:
    op.test_empty(shape)


@every_dtype
@pytest.mark.parametrize(("p", "q"), [(10, 10), (14, 6), (6, 14)])
def test_agrees_with_the_reference(on_emulator: None, p: int, q: int, dtype: torch.dtype) -> None:
    op.test_agrees_with_the_reference(p, q, dtype)


@every_dtype
@every_form
def test_writes_nothing_else(emulator: Any, p: int, q: int, shared_limit: int, dtype: torch.dtype) -> None:
    """Elements around the outputs, and the inputs, stay as they are."""
    a = torch.randn(3, p, q, dtype=dtype, generator=torch.Generator().manual_seed(0))
    a[1] = 0  # completes its vectors
    before, m = a.clone(), min(p, q)
    outputs = [torch.full((size + 20,), 7, dtype=dtype) for size in (3 * m * p, 3 * m, 3 * m * q)]
    outputs.append(torch.full((23,), 7, dtype=torch.int32))
    with emulation.emulated(emulator, 0, shared_limit):
        addresses = (t.data_ptr() + 10 * t.element_size() for t in outputs)
        is_double = dtype == torch.float64
        error = emulator.cuda_svd(a.data_ptr(), *addresses, batch=3, p=p, q=q, is_double=is_double, stream=0)
    assert error == 0 and torch.equal(a, before)
    for tensor in outputs:
        assert (tensor[:10] == 7).all() and (tensor[-10:] == 7).all() and (tensor[10:-10] != 7).all()


@pytest.mark.parametrize("shared_limit", [emulation.SHARED_LIMIT, IN_PLACE], ids=["shared", "in place"])
def test_every_barrier_is_needed(emulator: Any, shared_limit: int) -> None:
    """Without any one barrier of the block the kernel is caught, but for some of the last two sweeps, which turn few
    columns or none."""
    p, q = 35, 7
    a = torch.randn(1, p, q, generator=torch.Generator().manual_seed(0))
    a[..., 2] = 0
    with emulation.emulated(emulator, 0, shared_limit):
        total, missed = emulation.barriers_not_missed(emulator, lambda: fl.ops.svd(a), of_warp=False)
    last_sweeps = range(total - 4 - 2 * (q + 1), total - 4)
    assert total > 2 * len(last_sweeps) and set(missed) <= set(last_sweeps)
