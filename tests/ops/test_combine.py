"""Linear combinations of factors against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian, generator
from compiled import needs_same_bits
from factors import BACKENDS, DTYPES, SHAPES, columns, fill_padding, ragged_ranks, same_bits, special, strided, tall
from torch import Tensor

import fastlora as fl
from fastlora.core.factors import Factor, Term
from fastlora.core.updates import Update
from fastlora.engine import materialise

pytestmark = pytest.mark.portable


def small(batch: int, k: int, r: int, q: int, *, rows: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """Coefficients ``[batch, k, r, q]``, or ``[batch, k, q, r]`` with ``rows``."""
    c = gaussian(batch, k, r, q, seed=5, dtype=dtype)
    return c.mT.contiguous() if rows else c


def check(x: Tensor, c: Tensor, ranks: Tensor | None, rows: bool) -> None:
    """Every element within one rounding to the result's dtype, beside that of the float64 sum."""
    got = fl.ops.combine(x, c, ranks, rows=rows)
    batch, k = x.shape[:2]
    n, r, q = (x.shape[3], x.shape[2], c.shape[2]) if rows else (x.shape[2], x.shape[3], c.shape[3])
    assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert got.shape == ((batch, q, n) if rows else (batch, n, q))
    for b in range(batch):
        wanted, size = (torch.zeros(n, q, dtype=torch.float64) for _ in range(2))
        for i in range(k):
            rank = r if ranks is None else int(ranks[b, i])
            factor = columns(x[b, i], rank, rows)
            coefficient = (c[b, i].mT if rows else c[b, i]).double()[:rank]
            wanted += factor @ coefficient
            size += factor.abs() @ coefficient.abs()
        bound = torch.finfo(got.dtype).eps / 2 * wanted.abs() + k * (r + 1) * 2.3e-16 * size
        bound += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps / 2
        assert (((got[b].mT if rows else got[b]).double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_definition(backend: str, dtype: torch.dtype, rows: bool) -> None:
    with fl.use_backend(backend):
        for i, (batch, k, n, r) in enumerate(SHAPES):
            x = tall(batch, k, n, r, dtype=dtype, rows=rows)
            check(x, small(batch, k, r, (1, 4, 11)[i % 3], rows=rows), None, rows)
            check(x, small(batch, k, r, 5, rows=rows, dtype=torch.float32), None, rows)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_ranks(backend: str, rows: bool) -> None:
    with fl.use_backend(backend):
        for batch, k, n, r in SHAPES:
            x, c = tall(batch, k, n, r, dtype=torch.float32, rows=rows), small(batch, k, r, 6, rows=rows)
            ranks = ragged_ranks(batch, k, r)
            check(x, c, ranks, rows)
            dirty = fill_padding(x, ranks, torch.nan, rows)
            got = fl.ops.combine(dirty, c, ranks, rows=rows)
            assert torch.equal(got, fl.ops.combine(x, c, ranks, rows=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str, dtype: torch.dtype) -> None:
    with fl.use_backend(backend):
        for _, x in special(dtype):
            check(x, small(2, 3, 6, 5, rows=False), None, False)
            check(x.mT.contiguous(), small(2, 3, 6, 5, rows=True), None, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancellation_is_exact(dtype: torch.dtype) -> None:
    """A term of 1e8 that cancels leaves the small one, which a float32 sum would lose."""
    x = torch.randint(-9, 10, (1, 3, 40, 4), generator=generator(1)).to(dtype)
    x[:, 2] = x[:, 0]
    eye = torch.eye(4, dtype=torch.float64)
    got = fl.ops.combine(x, torch.stack([1e8 * eye, eye, -1e8 * eye])[None])
    assert torch.equal(got.double(), x[:, 1].double())


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory(dtype: torch.dtype, rows: bool) -> None:
    x, c = tall(2, 3, 67, 5, dtype=dtype, rows=rows), small(2, 3, 5, 4, rows=rows)
    expected = fl.ops.combine(x, c, rows=rows)
    for name, same in strided(x):
        assert torch.equal(fl.ops.combine(same, c, rows=rows), expected), name
    for name, same in strided(c):
        assert torch.equal(fl.ops.combine(x, same, rows=rows), expected), name


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_same_bits
def test_same_bits(dtype: torch.dtype, rows: bool) -> None:
    x, c = tall(3, 2, 1100, 9, dtype=dtype, rows=rows), small(3, 2, 9, 5, rows=rows)
    same_bits(lambda x, c: fl.ops.combine(x, c, rows=rows), x, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize(("batch", "k", "n", "r", "q"), [
    (0, 2, 5, 3, 4), (2, 0, 5, 3, 4), (2, 2, 0, 3, 4), (2, 2, 5, 0, 4), (2, 2, 5, 3, 0),
])  # fmt: skip
def test_empty(backend: str, batch: int, k: int, n: int, r: int, q: int, rows: bool) -> None:
    with fl.use_backend(backend):
        got = fl.ops.combine(
            tall(batch, k, n, r, dtype=torch.float32, rows=rows), small(batch, k, r, q, rows=rows), rows=rows
        )
    assert got.shape == ((batch, q, n) if rows else (batch, n, q))
    assert k * r > 0 or (got == 0).all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_writes_ragged_terms_rounded_once(backend: str, dtype: torch.dtype, rows: bool) -> None:
    """Factors of several terms side by side, on one another and scaled, two of them sharing a stored matrix."""
    side = "A" if rows else "B"
    first, second = (gaussian(130, r, seed=r, dtype=dtype) for r in (3, 10))
    c, d = gaussian(3, 5, seed=1, dtype=torch.float64), gaussian(10, 7, seed=2, dtype=torch.float64)
    exact = torch.zeros(130, 13, dtype=torch.float64)
    exact[:, 1:6] += 0.7 * first.double() @ c
    exact[:, 4:11] += -2.0 * second.double() @ d
    exact[:, 10:13] += first.double()
    parts = [(first, c, 1, 0.7), (second, d, 4, -2.0), (first, None, 10, 1.0)]
    turn = (lambda x: x.mT.contiguous()) if rows else (lambda x: x)
    terms = tuple(Term(turn(x), None if m is None else turn(m), at, scale) for x, m, at, scale in parts)
    other = Factor.of("B" if rows else "A", gaussian(*((8, 13) if rows else (13, 8)), seed=3, dtype=dtype))
    factor = Factor(side, 130, 13, terms)
    update = Update(other, factor) if rows else Update(factor, other)
    with fl.use_backend(backend):
        left, right = materialise.materialise([update], dtype)[0]
    got = (right.mT if rows else left).double()
    step = 2**-24 if dtype == torch.float16 else 0.0  # near zero, where others have smaller ones than what occurs
    # Half a unit in the last place; float32 sums of a dozen products come before where the result is half precision.
    assert ((got - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1.7 * step).all()
    assert (left if rows else right).data_ptr() == other.terms[0].source.data_ptr()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_matrices_of_several_dtypes_are_added(backend: str, rows: bool) -> None:
    """Whole matrices on one another, of which some have the dtype of the result: in any order all of them count."""
    side, turn = ("A", lambda x: x.mT.contiguous()) if rows else ("B", lambda x: x)
    other = Factor.of("B" if rows else "A", torch.eye(4))
    own = [gaussian(70, 4, seed=i, dtype=dtype) for i, dtype in enumerate(DTYPES)]
    scales = [1.0, -0.5, 2.0, 1.0]
    for first, x in enumerate(own):
        for second, y in enumerate(own):
            exact = scales[first] * x.double() + scales[second] * y.double()
            factor = Factor(side, 70, 4, (Term(turn(x), scale=scales[first]), Term(turn(y), scale=scales[second])))
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                with fl.use_backend(backend):
                    pair = Update(other, factor) if rows else Update(factor, other)
                    left, right = materialise.materialise([pair], dtype)[0]
                got = (right.mT if rows else left).double()
                size = abs(scales[first]) * x.double().abs() + abs(scales[second]) * y.double().abs()
                assert ((got - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-15 * size).all()
