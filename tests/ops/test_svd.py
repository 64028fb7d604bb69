"""Batched small SVD: accuracy, null spaces, determinism, bad input. On the instruction set in use."""

from __future__ import annotations

import pytest
import spectra
import torch
from compiled import COMPILED, needs_kernels, needs_same_bits
from isa_check import check_every_isa

import fastlora as fl

RECTANGLES = [(1, 7), (7, 1), (2, 5), (9, 4), (5, 16), (33, 17), (17, 33), (3, 130), (100, 40), (512, 8)]
SHAPES = [(n, n) for n in spectra.SIZES] + RECTANGLES


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_ratios(p: int, q: int, dtype: torch.dtype, batch: int = 9) -> None:
    # One matrix of each kind is enough at the largest sizes, where the kernel is slowest.
    names, batches = zip(*spectra.rectangular(p, q, dtype, batch if min(p, q) < 96 else 1), strict=True)
    u, s, vh = fl.ops.svd(torch.stack(batches))
    assert (s.diff(dim=-1) <= 0).all() and (s >= 0).all()
    for i, name in enumerate(names):
        ratios = spectra.svd_ratios(batches[i], u[i], s[i], vh[i])
        assert max(ratios.values()) <= spectra.RATIO_LIMIT, f"{p}x{q} {dtype} {name}: {ratios}"


@needs_same_bits
@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 5), (8, 8), (17, 12), (20, 33), (48, 48), (70, 52), (49, 90)])
def test_same_bits_in_any_batch(p: int, q: int, dtype: torch.dtype) -> None:
    a = torch.cat([a for _, a in spectra.rectangular(p, q, dtype, batch=2)])
    whole = fl.ops.svd(a)
    for name, other in spectra.call_variants(fl.ops.svd, a):
        for x, y in zip(whole, other, strict=True):
            assert torch.equal(x, y), name
            assert torch.equal(x.signbit(), y.signbit()), f"{name}: signs of zeros"


@pytest.mark.parametrize(("p", "q"), [(12, 7), (7, 12), (9, 9), (61, 51), (51, 61)])
def test_signs(p: int, q: int) -> None:
    for name, a in spectra.rectangular(p, q, torch.float64):
        vh = fl.ops.svd(a)[2]
        assert (vh.gather(-1, vh.abs().argmax(-1, keepdim=True)) > 0).all(), name


@pytest.mark.parametrize("n", [12, 60])
@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
def test_small_values_of_graded_columns_are_relatively_accurate(dtype: torch.dtype, n: int) -> None:
    if dtype == torch.float64 and not COMPILED:
        pytest.skip("needs compiled kernels: torch's float64 decomposition has the largest value's error in all")
    x = torch.randn(8, n + 8, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grade = 10 ** (-10 * torch.linspace(0, 1, n, dtype=torch.float64))
    a = (x * grade).to(dtype)
    # The same columns, scaled to equal norms, are well conditioned: singular values of the graded matrix are
    # then determined to a relative accuracy. Float64 sees it for float32; for float64 compare the reversal.
    s = fl.ops.svd(a)[1]
    expected = fl.ops.svd(a.double())[1] if dtype == torch.float32 else fl.ops.svd(a.flip(-1))[1]
    relative = ((s.double() - expected) / expected).abs().max().item()
    assert relative <= 200 * torch.finfo(dtype).eps, relative


@pytest.mark.parametrize(("p", "q"), [(11, 6), (56, 50), (50, 56)])
@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
def test_non_finite_matrices_stay_alone(dtype: torch.dtype, p: int, q: int) -> None:
    a = torch.cat([a for _, a in spectra.rectangular(p, q, dtype, batch=2)])
    bad = a.clone()
    bad[3] = torch.nan
    bad[17, 0, 5] = -torch.inf
    *results, info = fl.ops.svd_ex(bad)
    expected_info = torch.zeros(len(a), dtype=torch.int32)
    expected_info[[3, 17]] = 1
    assert torch.equal(info, expected_info)
    good = info == 0
    for x, y in zip(results, fl.ops.svd(a), strict=True):
        assert x[~good].isnan().all()
        assert torch.equal(x[good], y[good])
    with pytest.raises(ValueError, match=r"3, 17"):
        fl.ops.svd(bad)


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
def test_ends_of_the_range(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.tiny * limits.eps
    for size in (limits.max / 16, limits.tiny, 1000 * smallest, smallest):
        u, s, vh = fl.ops.svd(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=dtype)) * size)
        assert torch.equal(s, torch.tensor([3.0, 2.0, 1.0], dtype=dtype) * size), size
        assert torch.equal(u, torch.eye(3, dtype=dtype)[:, [1, 2, 0]]), size
        assert torch.equal(vh, u.mT), size


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 2), (3, 2, 0), (2, 0, 5, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    u, s, vh = fl.ops.svd(torch.empty(shape))
    expected = torch.linalg.svd(torch.empty(shape), full_matrices=False)
    assert [x.shape for x in (u, s, vh)] == [x.shape for x in expected]


@pytest.mark.parametrize("dtype", spectra.DTYPES, ids=str)
@pytest.mark.parametrize(("p", "q"), [(10, 10), (14, 6), (6, 14)])
def test_agrees_with_the_reference(p: int, q: int, dtype: torch.dtype) -> None:
    a = dict(spectra.rectangular(p, q, dtype))["arith"]
    u, s, vh = fl.ops.svd(a)
    with fl.use_backend("reference"):
        expected_u, expected_s, expected_vh = fl.ops.svd(a)
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(s, expected_s, rtol=0, atol=tolerance)
    # Pairs of vectors are determined up to a common sign by the gaps of at least 1/9.
    pairs, expected = (x.mT[..., None] * y[..., None, :] for x, y in ((u, vh), (expected_u, expected_vh)))
    # The smallest singular value, 1e-6, has a gap to its mirror image of that size only.
    torch.testing.assert_close(pairs[:, :-1], expected[:, :-1], rtol=0, atol=10 * tolerance)


@needs_kernels
def test_every_instruction_set() -> None:
    check_every_isa("svd")
