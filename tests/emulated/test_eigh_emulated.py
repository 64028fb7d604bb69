"""The CUDA eigendecomposition, by the tests of the op, on the emulator: a warp a matrix up to n = 32, divided from 17
on; a block a matrix, divided up to 128; then a block in shared memory, and one in the memory of the vectors."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import spectra
import test_eigh as op
import torch

import fastlora as fl

FORMS = {
    "warp": (12, emulation.SHARED_LIMIT),
    "divided in a warp": (20, emulation.SHARED_LIMIT),
    "divided": (33, emulation.SHARED_LIMIT),
    "in place": (33, 4096),
}
every_form = pytest.mark.parametrize(("n", "shared_limit"), FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 17, 18, 31, 32, 33, 48, 49])
def test_ratios(on_emulator: None, n: int, dtype: torch.dtype) -> None:
    op.test_ratios(n, dtype, batch=2)


@every_dtype
def test_ratios_in_place(on_emulator: None, emulator: Any, dtype: torch.dtype) -> None:
    emulator.set_shared_limit(4096)
    op.test_ratios(33, dtype, batch=2)


@every_dtype
@pytest.mark.parametrize("n", [64, 65, 97])
def test_ratios_of_larger_matrices(emulator: Any, n: int, dtype: torch.dtype) -> None:
    """One joint of two full leaves; three levels, of which the last joins a row, and a row and a half."""
    with emulation.emulated(emulator):
        op.test_ratios(n, dtype, batch=1)


@every_dtype
@pytest.mark.parametrize("n", [127, 128, 129])
def test_ratios_of_the_largest_that_is_divided(emulator: Any, n: int, dtype: torch.dtype) -> None:
    batches = dict(spectra.symmetric(n, dtype, batch=1))
    with emulation.emulated(emulator):
        for name in ("random", "zero-one", "wilkinson"):
            values, vectors = fl.ops.eigh(batches[name])
            assert max(spectra.eigh_ratios(batches[name], values, vectors).values()) <= spectra.RATIO_LIMIT, name


@every_dtype
@pytest.mark.parametrize("n", [5, 17])
def test_same_bits_in_any_batch(emulator: Any, n: int, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator):
        op.test_same_bits_in_any_batch(n, dtype)


# A small limit leaves room for a few matrices of 9 or 20 in a block, and for none of 35 or 129 in shared memory.
@every_dtype
@pytest.mark.parametrize(
    ("n", "limits"), [(9, (emulation.SHARED_LIMIT, 5000)), (20, (emulation.SHARED_LIMIT, 20_000)), (35, (5000,)),
                      (35, (emulation.SHARED_LIMIT,)), (129, (emulation.SHARED_LIMIT, 20_000))],
    ids=["9", "20", "35 in place", "35", "129"],
)  # fmt: skip
def test_same_bits_in_every_schedule_and_form(
    emulator: Any, n: int, limits: tuple[int, ...], dtype: torch.dtype
) -> None:
    kinds = spectra.symmetric(n, dtype, batch=1)
    a = torch.cat([a for name, a in kinds if n < 100 or name == "random"])
    results = []
    for schedule in (0, 1, 2) if n < 100 else (1,):
        for limit in limits:
            with emulation.emulated(emulator, schedule, limit):
                results.append(fl.ops.eigh(a))
    for values, vectors in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(vectors, results[0][1])


@every_form
def test_signs_and_lower_triangle(on_emulator: None, emulator: Any, n: int, shared_limit: int) -> None:
    emulator.set_shared_limit(shared_limit)
    op.test_signs_and_lower_triangle(n)


@every_dtype
@every_form
def test_non_finite_matrices_stay_alone(emulator: Any, n: int, shared_limit: int, dtype: torch.dtype) -> None:
    with emulation.emulated(emulator, 1, shared_limit):
        op.test_non_finite_matrices_stay_alone(dtype, n)


@every_dtype
@pytest.mark.parametrize("zeros", [0, 40])
def test_ends_of_the_range(on_emulator: None, dtype: torch.dtype, zeros: int) -> None:
    op.test_ends_of_the_range(dtype, zeros)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (2, 0, 5, 5)])
def test_empty(on_emulator: None, shape: tuple[int, ...]) -> None:
    op.test_empty(shape)


def test_strides_and_batch_dimensions(on_emulator: None) -> None:
    op.test_strides_and_batch_dimensions()


@every_dtype
def test_agrees_with_the_reference(on_emulator: None, dtype: torch.dtype) -> None:
    op.test_agrees_with_the_reference(dtype)


@every_dtype
@every_form
def test_writes_nothing_else(emulator: Any, n: int, shared_limit: int, dtype: torch.dtype) -> None:
    """Elements around the outputs, and the inputs, stay as they are."""
    a = torch.randn(3, n, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = a.clone()
    sizes = (3 * n, 3 * n * n)
    values, vectors = (torch.full((size + 20,), 7, dtype=dtype) for size in sizes)
    info = torch.full((23,), 7, dtype=torch.int32)
    with emulation.emulated(emulator, 0, shared_limit):
        addresses = (t.data_ptr() + 10 * t.element_size() for t in (values, vectors, info))
        error = emulator.cuda_eigh(a.data_ptr(), *addresses, batch=3, n=n, is_double=dtype == torch.float64, stream=0)
    assert error == 0 and torch.equal(a, before)
    for tensor in (values, vectors, info):
        assert (tensor[:10] == 7).all() and (tensor[-10:] == 7).all() and (tensor[10:-10] != 7).all()


@pytest.mark.parametrize("form", ["divided", "in place"])
def test_every_barrier_is_needed(emulator: Any, form: str) -> None:
    """Without any one barrier of the block, the kernel is caught. In this matrix both joints rotate equal columns."""
    n, shared_limit = FORMS[form]
    a = dict(spectra.symmetric(n, torch.float32, batch=1))["wilkinson" if form == "divided" else "random"]
    with emulation.emulated(emulator, 0, shared_limit):
        total, missed = emulation.barriers_not_missed(emulator, lambda: fl.ops.eigh(a), of_warp=False)
    assert total > 3 * n and not missed


@pytest.mark.parametrize(("n", "total", "rotations"), [(12, 40, []), (20, 97, [77])], ids=["12", "20"])
def test_barriers_of_a_warp_are_needed(emulator: Any, n: int, total: int, rotations: list[int]) -> None:
    """A step of the reduction has four: of the sum of squares, of v, of the dot product, which exchanges nothing else,
    and of w. Where a joint rotates no equal columns, that of the rotations orders nothing."""
    a = dict(spectra.symmetric(n, torch.float32, batch=1))["random"]
    with emulation.emulated(emulator):
        _, missed = emulation.barriers_not_missed(emulator, lambda: fl.ops.eigh(a), of_warp=True, total=total)
    first = 2  # of the scale, and of the matrix
    dots = [b for b in range(first, total) if b % 4 == 0 and b < 4 * (n - 2) + 2]
    assert [b for b in missed if b >= first] == dots + rotations
