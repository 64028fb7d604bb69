"""Addition, negation and analogy in both semantics, against dense float64 arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.data import Extra
from fastlora.core.updates import Layout, Update

SHAPES = {"layers.0.q": (24, 16), "layers.0.up": (40, 16), "layers.1.q": (7, 30)}
Dense = dict[str, tuple[Tensor, Tensor, float]]


def factors(seed: int, rank: int = 4, scaling: float = 2.0, dtype: torch.dtype = torch.float32) -> Dense:
    return {
        m: (gaussian(n, rank, seed=seed + i, dtype=dtype), gaussian(rank, k, seed=seed + 50 + i, dtype=dtype), scaling)
        for i, (m, (n, k)) in enumerate(SHAPES.items())
    }


def adapters(**parts: Dense) -> list[Adapter]:
    return [pools.make_adapter(name, found) for name, found in parts.items()]


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {m: pools.exact(u) for m, u in adapter.updates.items()}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = FLOAT32) -> None:
    assert got.keys() == expected.keys()
    for module, value in expected.items():
        assert float((got[module] - value).norm()) <= relative * float(value.norm()), module


def dense(found: Dense) -> dict[str, Tensor]:
    return {m: pools.dense(part) for m, part in found.items()}


A, B, C = factors(1), factors(200), factors(400)
RAGGED = factors(600, rank=9, scaling=0.25)
COARSE = {dtype: [factors(s, dtype=dtype) for s in (1, 200, 400)] for dtype in (torch.bfloat16, torch.float16)}


def elementwise(terms: list[tuple[float, float, Dense]]) -> dict[str, Tensor]:
    """``s (Σ β_i B_i)(Σ α_i A_i)``, the paper's update, in float64."""
    result = {}
    for module in SHAPES:
        left = sum(b * part[module][0].double() for b, _, part in terms)
        right = sum(a * part[module][1].double() for _, a, part in terms)
        result[module] = terms[0][2][module][2] * (left @ right)  # type: ignore[operator]
    return result


WEIGHTS = [(0.5, 0.5), (0.3, 0.7), (1.5, -0.5), (1.0, 0.0), (2.0, 6.0)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pem_addition(weights: tuple[float, float], dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = (A, B) if dtype == torch.float32 else COARSE[dtype][:2]
    shares = [w / sum(weights) for w in weights]
    result = fl.add(adapters(a=first, b=second), weights, semantics="pem")
    expected = elementwise([(shares[0], shares[0], first), (shares[1], shares[1], second)])
    assert_close(deltas(result), expected)
    assert {u.rank for u in result.updates.values()} == {4}
    assert bool(result.notes) == (sum(weights) != 1.0)
    loaded = fl.load(result.save(tmp_path / "sum", dtype="float32"))
    assert_close(deltas(loaded), expected)


@pytest.mark.parametrize("weights", [*WEIGHTS, (-2.0, 0.5), (0.0, 1.0), (1e-6, 1e6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_addition(weights: tuple[float, float], dtype: torch.dtype, tmp_path: Path) -> None:
    first = A if dtype == torch.float32 else COARSE[dtype][0]
    second = {m: part for m, part in RAGGED.items() if m != "layers.0.up"}  # other ranks, other scaling, a gap
    result = fl.add(adapters(a=first, b=second), weights)
    zero = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    one, two = dense(first), zero | dense(second)
    expected = {m: weights[0] * one[m] + weights[1] * two[m] for m in SHAPES}
    assert_close(deltas(result), expected)
    loaded = fl.load(result.save(tmp_path / "sum", dtype="float32"))
    assert_close(deltas(loaded), {m: v for m, v in expected.items() if bool(v.any())})


def test_default_weights() -> None:
    a, b, c = adapters(a=A, b=B, c=C)
    assert_close(deltas(fl.add([a, b, c])), {m: dense(A)[m] + dense(B)[m] + dense(C)[m] for m in SHAPES})
    third = 1 / 3
    expected = elementwise([(third, third, x) for x in (A, B, C)])
    result = fl.add([a, b, c], semantics="pem")
    assert_close(deltas(result), expected)
    assert result.notes == ()


def test_nothing_is_computed_before_it_is_needed() -> None:
    """A sum of factors is kept as the matrices that were loaded, with a number each."""
    a, b = adapters(a=A, b=B)
    for update in fl.add([a, b], [0.25, 0.75], semantics="pem").updates.values():
        for factor in (update.B, update.A):
            assert [(t.coefficient, t.scale) for t in factor.terms] == [(None, 0.25), (None, 0.75)]
    for m, update in fl.add([a, b], semantics="pem").updates.items():
        assert [t.source.data_ptr() for t in update.B.terms] == [A[m][0].data_ptr(), B[m][0].data_ptr()]


def test_cross_terms_make_the_semantics_differ() -> None:
    """``λ = ½``: exact is ``½ΔW_1 + ½ΔW_2``; the paper's has a quarter of each and of both cross terms."""
    a, b = adapters(a=A, b=B)
    exact, paper = deltas(fl.add([a, b], [0.5, 0.5])), deltas(fl.add([a, b], [0.5, 0.5], semantics="pem"))
    for m in SHAPES:
        left = A[m][0].double() + B[m][0].double()
        right = A[m][1].double() + B[m][1].double()
        torch.testing.assert_close(paper[m], 2.0 * 0.25 * left @ right)
        assert float((exact[m] - paper[m]).norm()) > 0.1 * float(exact[m].norm())


def test_two_copies_add_up_to_one() -> None:
    a, again = adapters(a=A, b=A)
    for semantics in ("exact", "pem"):
        assert_close(deltas(fl.add([a, again], [0.25, 0.75], semantics=semantics)), dense(A), FLOAT64)


@pytest.mark.parametrize("semantics", ["exact", "pem"])
@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0, 0.0])
def test_negation_negates_b_only(semantics: str, strength: float) -> None:
    (a,) = adapters(a=A)
    result = fl.negate(a, strength, semantics=semantics)
    assert_close(deltas(result), {m: -strength * v for m, v in dense(A).items()}, FLOAT64)
    if strength:
        for m, update in result.updates.items():
            assert update.A.stored is not None and update.A.stored.data_ptr() == A[m][1].data_ptr()
    assert result.provenance == {"negate": {"adapter": "a"}, "strength": strength, "semantics": semantics}


@pytest.mark.parametrize("coefficients", [(None, None), (0.7, 0.3), (1.0, -2.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_analogy(coefficients: tuple[float | None, float | None]) -> None:
    a, b, c = adapters(a=A, b=B, c=C)
    c0, c1 = (1.0 if x is None else x for x in coefficients)
    exact = fl.analogy(a, b, c, *coefficients)
    assert_close(deltas(exact), {m: c0 * dense(A)[m] + c1 * (dense(B)[m] - dense(C)[m]) for m in SHAPES})
    c0, c1 = (0.5 if x is None else x for x in coefficients)
    paper = fl.analogy(a, b, c, *coefficients, semantics="pem")
    assert_close(deltas(paper), elementwise([(c0, c0, A), (c1, c1, B), (-c1, c1, C)]))


def test_analogy_of_ragged_adapters_is_exact_only() -> None:
    a, b, r = adapters(a=A, b=B, r=RAGGED)
    assert_close(deltas(fl.analogy(a, b, r)), {m: dense(A)[m] + dense(B)[m] - dense(RAGGED)[m] for m in SHAPES})
    with pytest.raises(fl.InputError, match=r"layers.0.q has rank 4 in 'a' and 9 in 'r'.*use the semantics 'exact'"):
        fl.analogy(a, b, r, semantics="pem")


def test_provenance_says_which_semantics(tmp_path: Path) -> None:
    a, b = adapters(a=A, b=B)
    for result, semantics in (
        (a + b, "exact"),
        (fl.add([a, b]), "exact"),
        (fl.add([a, b], semantics="pem"), "pem"),
        (fl.analogy(a, b, a), "exact"),
        (fl.analogy(a, b, a, semantics="pem"), "pem"),
    ):
        assert result.provenance["semantics"] == semantics
        result.save(tmp_path / "out", overwrite=True)
        header = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:4000]
        assert f'\\"semantics\\": \\"{semantics}\\"'.encode() in header


def test_merge_method() -> None:
    pool = fl.Pool(adapters(a=A, b=B, c=C))
    merged = fl.merge(pool, {"a": 0.75, "b": 0.25}, method="pem")
    assert_close(deltas(merged), elementwise([(0.75, 0.75, A), (0.25, 0.25, B)]))
    assert merged.notes == ("c has no weight and counts 0",)
    assert_close(deltas(fl.merge(pool, method="pem")), elementwise([(1 / 3, 1 / 3, x) for x in (A, B, C)]))
    assert fl.methods()["pem"].source.startswith("PEM, arXiv 2306.14870")


def test_biases_take_part() -> None:
    a, b = adapters(a=A, b=B)
    a = replace(a, extras={"layers.0.q.bias": Extra("delta", torch.full((24,), 2.0))})
    b = replace(b, extras={"layers.0.q.bias": Extra("delta", torch.full((24,), 10.0))})
    result = fl.add([a, b], [0.25, 0.75], semantics="pem")
    assert result.extras["layers.0.q.bias"].tensor.unique().tolist() == [8.0]


REFUSED = {
    "ranks": (RAGGED, r"pem: layers.0.q has rank 4 in 'a' and 9 in 'b', .*use the semantics 'exact'"),
    "scalings": (
        factors(7, scaling=1.0),
        r"pem: layers.0.q has the scaling 2 in 'a' and 1 in 'b', .*use the semantics 'exact'.* or save both",
    ),
    "modules": (
        {m: p for m, p in B.items() if m != "layers.1.q"},
        r"pem: only one of 'a' and 'b' adapts layers.1.q, .*use the semantics 'exact'",
    ),
    "shapes": (
        {m: (p[0][:-1], p[1], p[2]) for m, p in B.items()},
        r"pem: layers.0.q is 24×16 in 'a' and 23×16 in 'b': .*different base models",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_correspond_is_refused(case: str) -> None:
    other, message = REFUSED[case]
    a, b = adapters(a=A, b=other)
    with pytest.raises(fl.InputError, match=message):
        fl.add([a, b], semantics="pem")
    with pytest.raises(fl.InputError):
        fl.add([b, a], semantics="pem")


def test_saving_puts_the_scaling_into_the_factors_so_that_pem_can_add(tmp_path: Path) -> None:
    """The way out of unequal scalings that the message names."""
    a, b = adapters(a=A, b=factors(7, scaling=1.0))
    with pytest.raises(fl.InputError, match="scaling"):
        fl.add([a, b], semantics="pem")
    loaded = [fl.load(x.save(tmp_path / x.name)) for x in (a, b)]
    assert fl.add(loaded, semantics="pem").modules == list(SHAPES)


def test_layouts_must_agree() -> None:
    a, b = adapters(a=A, b=B)
    first = next(iter(SHAPES))
    u = b.updates[first]
    b = replace(b, updates={**b.updates, first: Update(u.B, u.A, u.scaling, Layout("embedding"))})
    with pytest.raises(fl.InputError, match="different base models"):
        fl.add([a, b], semantics="pem")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], "sum to 0, and the semantics 'pem' divides"),
        ([-1.0, 0.5], "sum to -0.5"),
        ([0.0, 0.0], "sum to 0"),
        ([float("nan"), 1.0], "weight of 'a' is nan"),
        ([float("inf"), 1.0], "weight of 'a' is inf"),
        ([1.0], "2 adapters and 1 weights"),
    ],
    ids=str,
)
def test_weights_are_checked(weights: list[float], message: str) -> None:
    with pytest.raises(fl.InputError, match=message):
        fl.add(adapters(a=A, b=B), weights, semantics="pem")


def test_arguments_are_checked() -> None:
    a, b = adapters(a=A, b=B)
    with pytest.raises(fl.InputError, match="semantics='fisher' does not exist: use one of exact, pem"):
        fl.add([a, b], semantics="fisher")
    with pytest.raises(fl.InputError, match=r"an adapter is needed, not a str; .*\.adapters"):
        fl.add(fl.Pool([a, b]))
    with pytest.raises(fl.InputError, match="an adapter is needed, not a str"):
        fl.negate("a")
    with pytest.raises(fl.InputError, match="no adapter was given"):
        fl.add([])
    with pytest.raises(fl.InputError, match="the strength is nan"):
        fl.negate(a, float("nan"))
    with pytest.raises(fl.InputError, match="c1 is inf"):
        fl.analogy(a, b, a, 1.0, float("inf"))
    with pytest.raises(fl.InputError, match="'a' cannot be divided by 0"):
        a / 0
    with pytest.raises(fl.InputError, match="weight of 'a' is nan"):
        a * float("nan")
    for wrong in (lambda: a + 1, lambda: a * b, lambda: 1 - a, lambda: a * "2"):
        with pytest.raises(TypeError):
            wrong()  # type: ignore[no-untyped-call]


def test_nan_is_found_by_name() -> None:
    broken = {m: (p[0].clone(), p[1], p[2]) for m, p in B.items()}
    broken["layers.1.q"][0][3, 1] = torch.nan
    with pytest.raises(fl.InputError, match=r"adapter 'b': lora_B of layers.1.q holds NaN"):
        fl.merge(fl.Pool(adapters(a=A, b=broken)), method="pem")


numbers = st.floats(-3, 3, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=25, deadline=None)
@given(x=numbers, y=numbers, z=numbers)
def test_exact_arithmetic_is_that_of_a_vector_space(x: float, y: float, z: float) -> None:
    """Associativity, commutativity and distributivity, on ``ΔW``."""
    a, b, c = adapters(a=A, b=RAGGED, c=C)
    scale = sum(float(v.norm()) for part in (A, RAGGED, C) for v in dense(part).values())
    for left, right in (
        ((x * a + y * b) + z * c, x * a + (y * b + z * c)),
        (x * a + y * b, y * b + x * a),
        (x * (a + y * b), x * a + x * y * b),
        ((x + y) * a, x * a + y * a),
        (x * (y * a), (x * y) * a),
        (a - x * b, a + (-x) * b),
        (-(x * a), x * (-a)),
    ):
        got, expected = deltas(left), deltas(right)
        for m in SHAPES:
            assert float((got[m] - expected[m]).norm()) <= FLOAT32 * scale


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("dtypes", MIXED, ids=["bfloat16-float32", "float32-bfloat16", "float16-float32"])
def test_adapters_of_two_dtypes_both_count(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    first, second = factors(1, dtype=dtypes[0]), factors(200, dtype=dtypes[1])
    merged = fl.add(adapters(a=first, b=second), (0.25, 0.75), semantics="pem")
    expected = elementwise([(0.25, 0.25, first), (0.75, 0.75, second)])
    assert_close(deltas(merged), expected)
    merged.save(tmp_path / "out")
    assert_close(deltas(fl.load(tmp_path / "out")), expected)
