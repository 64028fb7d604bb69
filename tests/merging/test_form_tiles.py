"""Methods on elements of ``ΔW`` against the same rule on dense matrices; ``ties`` against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mixed
import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.errors import NonFiniteError
from fastlora.merging.forms import tiles
from fastlora.merging.forms.tiles import Tiles, tiles_of
from fastlora.reference.tiles import kth_magnitudes
from fastlora.runtime import memory

# Elements of ΔW are float64 products of a few terms, the decomposition is LAPACK's in float64.
TOLERANCE = 1e-13


def largest(weighted: Tensor, *, power: float = 1.0) -> Tensor:
    """The element of the largest magnitude.

    Args:
        power: of the magnitude
    """
    place = weighted.abs().argmax(0, keepdim=True)
    return weighted.gather(0, place)[0].abs() ** power * weighted.gather(0, place)[0].sign()


def counted(module: Tiles, *, share: float) -> int:
    return round(share * sum(t[0].numel() for t in module))


def numbered(weighted: Tensor, count: int, *, share: float = 0.5, add: float = 0.0) -> Tensor:
    """The sum, beside what was counted.

    Args:
        share: of the elements
        add: to every element
    """
    return weighted.sum(0) + count + add


def ties_by_definition(
    matrices: Tensor, weights: list[float], density: float, combine: str, convention: str, elect: str = "total"
) -> Tensor:
    """Of dense ``ΔW_i [k, n, m]``, element by element."""
    k, n, m = matrices.shape
    kept = int(density * n * m)
    trimmed = torch.zeros(k, n * m, dtype=torch.float64)
    for i in range(k):
        order = matrices[i].abs().flatten().sort(descending=True, stable=True)
        if kept:
            places = (
                order.indices[order.values >= order.values[kept - 1]] if convention == "paper" else order.indices[:kept]
            )
            trimmed[i, places] = matrices[i].flatten()[places]
    votes = [w if convention == "mergekit" else 1.0 for w in weights]
    sums = []
    for values in trimmed.T.tolist():
        voted = [v * x for v, x in zip(votes, values, strict=True)]
        sums.append(sum((x > 0) - (x < 0) for x in voted) if elect == "frequency" else math.fsum(voted))
    majority = sum((s > 0) - (s < 0) for s in sums)
    result = []
    for values, total in zip(trimmed.T.tolist(), sums, strict=True):
        sign = -1.0 if total < 0 or (total == 0 and convention == "paper" and majority < 0) else 1.0
        agreeing = [i for i, x in enumerate(values) if votes[i] * x * sign > 0]
        divisor = sum(weights[i] if convention == "mergekit" else 1.0 for i in agreeing) if combine == "mean" else 1.0
        result.append(sum(weights[i] * values[i] for i in agreeing) / (divisor or 1.0))
    return torch.tensor(result, dtype=torch.float64).view(n, m)


def test_a_rule_on_tiles_is_the_rule_on_dense_matrices() -> None:
    pool = mixed.mixed_pool(dtype=torch.float64)
    with mixed.registered(tiles.method(summary="an example", source="this test"), largest) as name:
        merged = fl.merge(pool, mixed.WEIGHTS, method=name, rank=40)
        squared = fl.merge(pool, mixed.WEIGHTS, method=name, rank=40, power=2)
    for module in pool.modules:
        matrices = mixed.dense(pool, module, mixed.WEIGHTS)
        expected = matrices.gather(0, matrices.abs().argmax(0, keepdim=True))[0]
        assert mixed.distance(merged, module, expected) <= TOLERANCE
        assert mixed.distance(squared, module, expected.square() * expected.sign()) <= TOLERANCE
    assert merged.name == name and merged.provenance["parameters"] == {"rank": 40, "power": 1.0}


def test_what_is_measured_first_is_handed_over() -> None:
    pool = pools.make_pool(pools.planted(2))
    with mixed.registered(tiles.method(summary="x", source="y", measure=counted), numbered) as name:
        merged = fl.merge(pool, method=name, rank=40, share=0.002, add=1.0)
    expected = mixed.dense(pool, MODULE).sum(0) + round(0.002 * pools.N * pools.M) + 1.0
    assert mixed.distance(merged, MODULE, expected) <= TOLERANCE


def test_results_of_all_dtypes_are_those_of_what_is_stored() -> None:
    """Factors of a half precision are taken as they are; elements and results are float32."""
    pool = mixed.mixed_pool()
    merged = fl.merge(pool, mixed.WEIGHTS, method="ties", density=0.3, rank=40)
    weights = [w for w in mixed.WEIGHTS.values() if w]
    for module in pool.modules:
        matrices = mixed.dense(pool, module)[:4]  # the last has the weight 0, and takes no part
        expected = ties_by_definition(matrices, weights, 0.3, "mean", "peft")
        assert mixed.distance(merged, module, expected) <= 6 * torch.finfo(torch.float32).eps  # factors, sums
        assert merged.updates[module].dtypes() == {torch.float32}


CONVENTIONS = [("peft", "total"), ("peft", "frequency"), ("mergekit", "total"), ("paper", "total")]


@pytest.mark.parametrize("kind", pools.POOLS)
@pytest.mark.parametrize(("convention", "elect"), CONVENTIONS)
@pytest.mark.parametrize(
    ("density", "combine"), [(0.001, "mean"), (0.01, "sum"), (0.2, "mean"), (0.9, "mean"), (1.0, "sum")]
)
def test_ties(kind: str, density: float, combine: str, convention: str, elect: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    weights = {"a0": 0.5, "a1": -1.0, "a2": 2.0}
    expected = ties_by_definition(
        mixed.dense(pool, MODULE), list(weights.values()), density, combine, convention, elect
    )
    given: dict[str, Any] = {"density": density, "combine": combine, "convention": convention, "elect": elect}
    merged = fl.merge(pool, weights, method="ties", rank=40, **given)
    assert mixed.distance(merged, MODULE, expected) <= TOLERANCE
    assert merged.provenance["retained_energy"] == pytest.approx(1.0, abs=1e-12)
    cut = fl.merge(pool, weights, method="ties", rank=3, min_energy=0.0, **given)
    sigma = torch.linalg.svdvals(expected)
    best = float(sigma[3:].square().sum().sqrt())
    assert cut.updates[MODULE].rank <= 3
    error = float((pools.exact(cut.updates[MODULE]) - expected).norm())
    assert error == pytest.approx(best, abs=TOLERANCE * 10 * float(sigma[0]))


@pytest.mark.parametrize(("convention", "last"), [("peft", 2.0), ("mergekit", 2.0), ("paper", -2.0)])
def test_ties_where_values_cancel(convention: str, last: float) -> None:
    """The paper takes the sign of most places, which is minus; the others take plus."""
    rows = [torch.tensor([[-1.0, -1.0, 2.0]]), torch.tensor([[-1.0, -1.0, -2.0]])]
    pool = pools.make_pool([(torch.ones(1, 1, dtype=torch.float64), row.double(), 1.0) for row in rows])
    merged = fl.merge(pool, method="ties", density=1.0, convention=convention, rank=3)
    expected = torch.tensor([[-1.0, -1.0, last]], dtype=torch.float64)
    assert mixed.distance(merged, MODULE, expected) <= TOLERANCE


def test_ties_by_default_keeps_a_fifth() -> None:
    pool = pools.make_pool(pools.planted(2))
    default = {"density": 0.2, "convention": "peft", "elect": "total", "combine": "mean"}
    plain, told = (fl.merge(pool, method="ties", energy=0.9, **p) for p in ({}, default))  # type: ignore[arg-type]
    assert torch.equal(pools.exact(plain.updates[MODULE]), pools.exact(told.updates[MODULE]))
    assert plain.provenance["parameters"] == {"energy": 0.9, **default}
    assert 0.9 <= float(plain.provenance["retained_energy"]) < 1.0  # type: ignore[arg-type]


def test_ties_is_that_of_peft() -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    pool = pools.make_pool(pools.planted(3))
    matrices, weights = list(mixed.dense(pool, MODULE)), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for density, elect in ((0.1, "total"), (0.5, "frequency")):
        expected = theirs.ties(matrices, weights, density, elect)
        given = dict(zip(pool.names, weights.tolist(), strict=True))
        merged = fl.merge(pool, given, method="ties", density=density, elect=elect, rank=40)
        assert mixed.distance(merged, MODULE, expected) <= TOLERANCE


def test_updates_of_zero_and_of_rank_zero() -> None:
    pool = mixed.mixed_pool(dtype=torch.float64)
    merged = fl.merge(pool, {"zero": 1.0}, method="ties", rank=3)
    assert [u.rank for u in merged.updates.values()] == [0, 0, 0]
    assert merged.details["retained_energy"] == {"wide": 1.0, "tall": 1.0, "small": 1.0}


@pytest.mark.parametrize("side", [1, 3, 7, 12, 40])
def test_tiles_cover_a_module_once_in_any_size(side: int) -> None:
    pool = mixed.mixed_pool()
    weights = [mixed.WEIGHTS[n] for n in pool.names]
    for module in pool.modules:
        cut = tiles_of(pool, module, weights, side)
        expected = mixed.dense(pool, module, mixed.WEIGHTS)
        whole = torch.full_like(expected, torch.nan)
        for (rows, columns), values in zip(cut.places(), cut, strict=True):
            assert whole[:, rows, columns].isnan().all() and max(values.shape[1:]) <= side
            whole[:, rows, columns] = values
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-13)
        assert torch.equal(torch.cat([t.flatten() for t in cut]), torch.cat([t.flatten() for t in cut]))


def test_results_do_not_depend_on_the_tiles() -> None:
    parts = [(gaussian(1100, 3, seed=i), gaussian(3, 30, seed=10 + i), 1.0) for i in range(2)]
    pool = pools.make_pool(parts)
    with mixed.registered(tiles.method(summary="an example", source="this test"), largest) as name:
        whole = fl.merge(pool, method=name, rank=4, min_energy=0.0)
        with memory.bounded(1):
            side = tiles_of(pool, MODULE, [1.0, 1.0]).side
            assert (
                side < 1100 and 2 * 8 * side**2 <= memory.LEAST
            )  # of both adapters together, whatever a module's size
            parted = fl.merge(pool, method=name, rank=4, min_energy=0.0)
    # An element may be summed in another order, which changes no choice here.
    assert mixed.distance(parted, MODULE, pools.exact(whole.updates[MODULE])) <= 1e-6  # float32 singular vectors


def magnitudes() -> dict[str, Tensor]:
    tiny = torch.finfo(torch.float64).tiny
    return {
        "normal": gaussian(3, 40, 17, seed=1, dtype=torch.float64),
        "few values": gaussian(3, 40, 17, seed=2, dtype=torch.float64).round(),
        "signs": gaussian(3, 40, 17, seed=3, dtype=torch.float64).sign(),
        "all scales": 10 ** (300 * gaussian(3, 40, 17, seed=4, dtype=torch.float64).clamp(-1, 1)),
        "denormal": tiny * gaussian(3, 40, 17, seed=5, dtype=torch.float64),
        "zeros": torch.zeros(3, 40, 17, dtype=torch.float64),
        "neighbours": 1 + torch.finfo(torch.float64).eps * torch.arange(3 * 680, dtype=torch.float64).view(3, 40, 17),
    }


@pytest.mark.parametrize("kind", magnitudes())
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 340, 680), (679, 100, 0)], ids=str)
def test_kth_magnitudes_are_exact(kind: str, ranks: tuple[int, int, int]) -> None:
    values = magnitudes()[kind]
    found = kth_magnitudes(values.split(7, dim=1), ranks)
    ordered = values.abs().flatten(1).sort(descending=True).values
    assert found.tolist() == [float(row[q - 1]) if q else torch.inf for row, q in zip(ordered, ranks, strict=True)]


def undefined(weighted: Tensor) -> Tensor:
    return weighted.sum(0) / 0.0


def flat(weighted: Tensor) -> Tensor:
    return weighted.sum((0, 1))


@pytest.mark.parametrize(("program", "error", "said"), [
    (undefined, fl.InputError, f"method 'undefined': the result for {MODULE} is too large or not finite"),
    (flat, TypeError, r"method 'flat': a float64 \[1, 40, 28\] is needed, not torch.float64 \[1, 28\]"),
])  # fmt: skip
def test_results_that_are_refused(program: Callable[..., Tensor], error: type[Exception], said: str) -> None:
    decorate = tiles.method(summary="x", source="y")
    with mixed.registered(decorate, program) as name, pytest.raises(error, match=said):
        fl.merge(pools.make_pool(pools.planted(2)), method=name, rank=2)


@pytest.mark.parametrize(("given", "said"), [
    ({}, "method 'ties' gives matrices of full rank: give the rank of the result, or the energy to keep"),
    ({"rank": 0}, "rank=0 must be at least 1"), ({"rank": 1, "energy": 0.5}, "not both"),
    ({"rank": 1, "density": 0.0}, "ties: density=0 must be above 0 and at most 1"),
    ({"rank": 1, "density": 1.5}, "ties: density=1.5 must be above 0"),
    ({"rank": 1, "min_energy": 1.5}, "min_energy=1.5 must be at least 0 and at most 1"),
    ({"rank": 1, "convention": "own"}, "convention='own' does not exist: use one of peft, mergekit, paper"),
    ({"rank": 1, "combine": "median"}, "combine='median' does not exist: use one of mean, sum"),
])  # fmt: skip
def test_parameters_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(fl.InputError, match=said):
        fl.merge(pools.make_pool(pools.planted(2)), method="ties", **given)


def test_nan_and_overflow_are_refused() -> None:
    bad = pools.planted(2)
    bad[1][1][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=f"adapter 'a1': lora_A of {MODULE} holds NaN or Inf"):
        fl.merge(pools.make_pool(bad), method="ties", rank=2)
    with pytest.raises(fl.InputError, match=f"the weighted updates of {MODULE} overflow: lower the weights"):
        fl.merge(pools.make_pool(pools.planted(2)), {"a0": 1e308, "a1": 1e308}, method="ties", combine="sum", rank=2)
