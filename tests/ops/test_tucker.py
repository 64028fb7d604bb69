"""The way up to common subspaces: against the reference, where it ends, and bit for bit against itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled import needs_same_bits
from factors import BACKENDS
from tolerances import FLOAT64, ROOT64, ROUNDOFF64
from torch import Tensor

from fastlora.ops.dispatch import use_backend
from fastlora.ops.tucker import tucker

# g, k, r, n, m, c
SHAPES = {
    "one adapter": (3, 1, 6, 20, 13, 4), "odd": (5, 3, 3, 17, 9, 5), "wide": (2, 6, 16, 96, 96, 16),
    "one column": (2, 2, 1, 3, 2, 1), "all columns": (2, 3, 4, 5, 7, 5), "thin": (2, 4, 2, 40, 33, 9),
}  # fmt: skip
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(kind: str, seed: int = 0) -> Problem:
    """Sides of falling sizes with ``Σ‖M_i‖² = 1``, and where to start."""
    g, k, r, n, m, c = SHAPES[kind]
    draw = torch.Generator().manual_seed(seed)
    left, right, U, V = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((g, k, r, n), (g, k, r, m), (g, n, c), (g, m, c))
    )
    left = left * 0.7 ** torch.arange(r, dtype=torch.float64)[:, None]
    left = left / (left.mT @ right).square().sum((1, 2, 3)).sqrt()[:, None, None, None]
    return left, right, torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]


def value(left: Tensor, right: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return (U.mT[:, None] @ (left.mT @ right) @ V[:, None]).square().sum((1, 2, 3))


def slope(left: Tensor, right: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The size of the gradient of ``f/2``, from dense matrices."""
    M = left.mT @ right
    S = U.mT[:, None] @ M @ V[:, None]
    G, H = (M @ V[:, None] @ S.mT).sum(1), (M.mT @ U[:, None] @ S).sum(1)
    return ((G - U @ (U.mT @ G)).square().sum((1, 2)) + (H - V @ (V.mT @ H)).square().sum((1, 2))).sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_definition(kind: str, backend: str) -> None:
    """A few steps are those of the formulas; later ones amplify rounding."""
    given = problem(kind)
    with use_backend("reference"):
        wanted = tucker(*given, iterations=3, tolerance=0.0)
    with use_backend(backend):
        found = tucker(*given, iterations=3, tolerance=0.0)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=FLOAT64)
    before = value(*given)
    for iterations in (1, 2, 3):
        with use_backend(backend):
            after = value(*given[:2], *tucker(*given, iterations=iterations, tolerance=0.0)[:2])
        assert bool((after >= before - ROUNDOFF64).all())
        before = after


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_where_every_finite_way_ends(kind: str, backend: str) -> None:
    given = problem(kind)
    with use_backend(backend):
        U, V, steps = tucker(*given, iterations=2000, tolerance=0.0)
    assert bool((slope(*given[:2], U, V) <= ROOT64).all()) and int(steps.max()) < 2000
    for x in (U, V):
        torch.testing.assert_close(
            x.mT @ x, torch.eye(x.shape[2]).double().expand(len(x), -1, -1), rtol=0, atol=FLOAT64
        )
    if kind == "one adapter":  # what is most of one matrix is known
        sigma = torch.linalg.svdvals((given[0].mT @ given[1])[:, 0])[:, : U.shape[2]]
        torch.testing.assert_close(value(*given[:2], U, V), sigma.square().sum(1), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_modules(backend: str) -> None:
    left, right, U, V = problem("odd")
    left[0] = 0  # nothing to keep
    left[1, 1:], right[1, 1:] = 0, 0  # one adapter alone
    left[2, 2], right[2, 2] = left[2, 1], right[2, 1]  # copies
    left[3, :, 1:] = 0  # rank 1 each: both subspaces hold everything
    with use_backend(backend):
        found = tucker(left, right, U, V, iterations=2000, tolerance=0.0)
    assert torch.equal(found[0][0], U[0]) and torch.equal(found[1][0], V[0]) and int(found[2][0]) == 0
    assert bool((slope(left, right, *found[:2]) <= ROOT64).all())
    total = (left.mT @ right).square().sum((1, 2, 3))
    torch.testing.assert_close(value(left, right, *found[:2])[[1, 3]], total[[1, 3]], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_when_it_stops(backend: str) -> None:
    given = problem("odd")
    with use_backend(backend):
        start, some, loose, tight = (
            tucker(*given, iterations=most, tolerance=tolerance)
            for most, tolerance in ((0, 0.0), (2, 0.0), (500, 1e-2), (500, 1e-7))
        )
        end = tucker(*given[:2], *tight[:2], iterations=500, tolerance=1e-2)
    assert torch.equal(start[0], given[2]) and torch.equal(start[1], given[3]) and not start[2].any()
    assert some[2].tolist() == [2] * 5 and bool((loose[2] < tight[2]).all()) and int(end[2].max()) <= 1
    errors = [(1 - value(*given[:2], *x[:2])).sqrt() for x in (loose, tight)]
    assert bool((errors[1] <= errors[0]).all())


@needs_same_bits
def test_same_bits_alone_and_together(threads: Callable[[int], None]) -> None:
    given = problem("odd")
    with use_backend("auto"):
        together = tucker(*given, iterations=50, tolerance=1e-9)
        threads(1)
        for i in range(5):
            alone = tucker(*(x[i : i + 1] for x in given), iterations=50, tolerance=1e-9)
            assert all(torch.equal(x[i], y[0]) for x, y in zip(together, alone, strict=True))


def test_what_is_empty_and_what_is_refused() -> None:
    left, right, U, V = problem("odd")
    for some in (
        (left[:0], right[:0], U[:0], V[:0]),
        (left[:, :0], right[:, :0], U, V),
        (left, right, U[..., :0], V[..., :0]),
    ):
        ends = tucker(*some, iterations=5, tolerance=0.0)
        assert torch.equal(ends[0], some[2]) and torch.equal(ends[1], some[3]) and not ends[2].any()
    with pytest.raises(TypeError, match=r"tucker: U must be float64, got torch\.float32"):
        tucker(left, right, U.float(), V, iterations=1, tolerance=0.0)
    with pytest.raises(ValueError, match=r"tucker: right must be \[5, 3, 3, 9\], got \[5, 2, 3, 9\]"):
        tucker(left, right[:, :2], U, V, iterations=1, tolerance=0.0)
    with pytest.raises(ValueError, match="tucker: left must have 4 dimensions"):
        tucker(left[0], right, U, V, iterations=1, tolerance=0.0)
    with pytest.raises(ValueError, match="tucker: 10 columns of U and V are more than n=17 or m=9"):
        tucker(left, right, torch.cat([U, U], 2), torch.cat([V, V], 2), iterations=1, tolerance=0.0)
