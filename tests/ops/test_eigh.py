"""Batched symmetric eigendecomposition: accuracy, determinism, bad input, on the instruction set in use."""

from __future__ import annotations

import pytest
import spectra
import torch
from compiled import needs_kernels, needs_same_bits
from isa_check import check_every_isa

import fastlora as fl


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize("n", spectra.SIZES)
def test_ratios(n: int, dtype: torch.dtype, batch: int = 9) -> None:
    names, batches = zip(*spectra.symmetric(n, dtype, batch), strict=True)
    values, vectors = fl.ops.eigh(torch.stack(batches))
    assert (values.diff(dim=-1) >= 0).all()
    for name, a, w, v in zip(names, batches, values, vectors, strict=True):
        ratios = spectra.eigh_ratios(a, w, v)
        assert max(ratios.values()) <= spectra.RATIO_LIMIT, f"n={n} {dtype} {name}: {ratios}"


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 17, 33, 64, 83, 101, 128])
@needs_same_bits
def test_same_bits_in_any_batch(n: int, dtype: torch.dtype) -> None:
    a = torch.cat([a for _, a in spectra.symmetric(n, dtype, batch=2)])
    whole = fl.ops.eigh(a)
    for name, other in spectra.call_variants(fl.ops.eigh, a):
        for x, y in zip(whole, other, strict=True):
            assert torch.equal(x, y), name
            assert torch.equal(x.signbit(), y.signbit()), f"{name}: signs of zeros"


@pytest.mark.parametrize("n", [9, 101])
def test_signs_and_lower_triangle(n: int) -> None:
    a = torch.randn(20, n, n, generator=torch.Generator().manual_seed(0))
    lower = a.tril() + a.tril(-1).mT
    values, vectors = fl.ops.eigh(a)
    same = fl.ops.eigh(lower)
    assert torch.equal(values, same[0]) and torch.equal(vectors, same[1])
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("n", [12, 98])
@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
def test_non_finite_matrices_stay_alone(dtype: torch.dtype, n: int) -> None:
    a = torch.cat([a for _, a in spectra.symmetric(n, dtype, batch=2)])
    bad = a.clone()
    bad[3] = torch.nan
    bad[17, n - 1, 0] = torch.inf
    values, vectors, info = fl.ops.eigh_ex(bad)
    expected_info = torch.zeros(len(a), dtype=torch.int32)
    expected_info[[3, 17]] = 1
    assert torch.equal(info, expected_info)
    assert values[[3, 17]].isnan().all() and vectors[[3, 17]].isnan().all()
    good = info == 0
    for x, y in zip((values, vectors), fl.ops.eigh(a), strict=True):
        assert torch.equal(x[good], y[good])
    with pytest.raises(ValueError, match=r"3, 17"):
        fl.ops.eigh(bad)


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [0, 97])
def test_ends_of_the_range(dtype: torch.dtype, zeros: int) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.tiny * limits.eps
    for size in (limits.max / 16, limits.tiny, 1000 * smallest, smallest):
        diagonal = torch.zeros(zeros + 3, dtype=dtype)
        diagonal[-3:] = torch.tensor([1.0, 3.0, 2.0], dtype=dtype) * size
        values, vectors = fl.ops.eigh(torch.diag(diagonal))
        order = diagonal.argsort(stable=True)
        assert torch.equal(values, diagonal[order]), size
        assert torch.equal(vectors, torch.eye(zeros + 3, dtype=dtype)[:, order]), size


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0), (2, 0, 5, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    values, vectors = fl.ops.eigh(torch.empty(shape))
    assert values.shape == shape[:-1] and vectors.shape == shape


def test_strides_and_batch_dimensions() -> None:
    a = torch.randn(2, 3, 6, 12, generator=torch.Generator().manual_seed(0))[..., ::2]
    a = a + a.mT
    values, vectors = fl.ops.eigh(a)
    flat = fl.ops.eigh(a.reshape(6, 6, 6).contiguous())
    assert torch.equal(values.reshape(6, 6), flat[0])
    assert torch.equal(vectors.reshape(6, 6, 6), flat[1])


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
def test_agrees_with_the_reference(dtype: torch.dtype) -> None:
    a = dict(spectra.symmetric(10, dtype))["arith"]
    values, vectors = fl.ops.eigh(a)
    with fl.use_backend("reference"):
        expected_values, expected_vectors = fl.ops.eigh(a)
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(values, expected_values, rtol=0, atol=tolerance)
    # Vectors are determined up to sign by the gaps of 1/9; the sign rule may meet a tie.
    projectors, expected = (v.mT[..., None] * v.mT[..., None, :] for v in (vectors, expected_vectors))
    torch.testing.assert_close(projectors, expected, rtol=0, atol=10 * tolerance)


@needs_kernels
def test_every_instruction_set() -> None:
    check_every_isa("eigh")
