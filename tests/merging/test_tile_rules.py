"""Rules of the kernels through ``fl.merge``, against dense definitions of their owners' formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixed
import pools
import pytest
import torch
from builders import gaussian
from compiled import COMPILED
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Between, Largest, Random, Ranked, Rule, Varied
from fastlora.ops.merge_tiles import bound_of, key_of
from fastlora.reference import merge_tiles as formula

TOLERANCE = 1e-13  # elements, sums and LAPACK's decomposition in float64
WEIGHTS = [0.5, -1.0, 2.0]
NAMES = ["a0", "a1", "a2"]
SEED = 5


def first_of(sizes: Tensor, q: int) -> Tensor:
    """Where the ``q`` largest are, of equals the first."""
    mask = torch.zeros(sizes.numel(), dtype=torch.bool)
    mask[sizes.flatten().sort(descending=True, stable=True).indices[:q]] = True
    return mask.view_as(sizes)


def drawn(i: int, shape: tuple[int, int], keep: Tensor | int) -> Tensor:
    return formula.random_mask(shape, keep, key_of(SEED, NAMES[i]), key_of(MODULE))


def weighted(x: Tensor, weights: list[float]) -> Tensor:
    return x * torch.tensor(weights, dtype=torch.float64)[:, None, None]


def agreeing(v: Tensor, votes: Tensor) -> Tensor:
    """mergekit's and PEFT's mask: the sign of a value is that of the sum, plus where that is zero."""
    sign = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    return (v * (votes.sign() == sign)).sum(0)


def l1_rescaled(x: Tensor, v: Tensor) -> Tensor:
    return torch.stack([b * (a.abs().sum() / b.abs().sum()) if b.any() else b for a, b in zip(x, v, strict=True)])


def magnitude(x: Tensor) -> Tensor:
    kept = torch.stack([first_of(d.abs(), int(0.3 * d.numel())) for d in x])
    return weighted(x * kept, WEIGHTS).sum(0)


def breadcrumbs(x: Tensor) -> Tensor:
    """mergekit's: the top γN and the bottom N − dN − γN are dropped."""
    size = x[0].numel()
    top = int(0.05 * size)
    v = torch.stack([d * (first_of(d.abs(), top + int(0.4 * size)) & ~first_of(d.abs(), top)) for d in x])
    return agreeing(weighted(v, WEIGHTS), weighted(v, WEIGHTS))


def dare_linear(x: Tensor) -> Tensor:
    """PEFT's: masks, divided by the density."""
    v = torch.stack([d * drawn(i, (pools.N, pools.M), bound_of(0.4)) / 0.4 for i, d in enumerate(x)])
    return weighted(v, WEIGHTS).sum(0)


def dare_ties(x: Tensor) -> Tensor:
    """mergekit's: masks, rescaled to the old sum of sizes, weighted votes."""
    v = torch.stack([d * drawn(i, (pools.N, pools.M), bound_of(0.4)) for i, d in enumerate(x)])
    w = weighted(l1_rescaled(x, v), WEIGHTS)
    return agreeing(w, w)


def della(x: Tensor) -> Tensor:
    """mergekit's: probabilities from 0.3 to 0.5 by the rank in the row, rescaled, a weighted mean."""
    kept = []
    for i, d in enumerate(x):
        ranks = d.abs().argsort(1).argsort(1).double()
        p = 0.3 + 0.2 * ranks / (pools.M - 1)
        kept.append(d * drawn(i, (pools.N, pools.M), (p * 2.0**32).long()))
    v = l1_rescaled(x, torch.stack(kept))
    return weighted(v, WEIGHTS).sum(0) / sum(WEIGHTS)


def sce(x: Tensor) -> Tensor:
    """mergekit's: the places of the largest variances, weights by energy, signs of the plain sum."""
    variance = x.var(0, unbiased=False)
    v = x * first_of(variance, int(0.3 * int((variance != 0).sum())))
    energies = v.square().mean((1, 2))
    shares = energies / energies.sum()
    agree = v.sign() == torch.where(v.sum(0) >= 0, 1.0, -1.0)
    total = (v * shares[:, None, None] * agree).sum(0)
    return total / (shares[:, None, None] * agree).sum(0).clamp(min=1e-6)


RULES: dict[str, tuple[Callable[[Tensor], Tensor], Rule]] = {
    "magnitude": (magnitude, Rule(Largest(0.3))),
    "breadcrumbs": (breadcrumbs, Rule(Between(0.4, 0.05), elect="total", votes="weighted")),
    "dare_linear": (dare_linear, Rule(Random(0.4, SEED), "density")),
    "dare_ties": (dare_ties, Rule(Random(0.4, SEED), "l1", elect="total", votes="weighted")),
    "della": (della, Rule(Ranked(0.4, 0.1, SEED), "l1", divide="weights")),
    "sce": (sce, Rule(Varied(0.3), elect="total", divide="weights", weigh="energy")),
    "sum": (lambda x: 0.5 * weighted(x, WEIGHTS).sum(0), Rule(scale=0.5)),
}


def merged_by(rule: Rule, pool: fl.Pool, weights: dict[str, float], **given: Any) -> fl.Adapter:
    def by_rule() -> Rule:
        return rule

    with mixed.registered(tiles.rule(summary="x", source="y"), by_rule) as name:
        return fl.merge(pool, weights, method=name, **given)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["planted", "ragged", "with_zero", "scalings"])
def test_rules_of_the_owners(kind: str, name: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    definition, rule = RULES[name]
    weights = dict.fromkeys(NAMES, 1.0) if name == "sce" else dict(zip(NAMES, WEIGHTS, strict=True))
    merged = merged_by(rule, pool, weights, rank=40)
    expected = definition(mixed.dense(pool, MODULE))
    assert mixed.distance(merged, MODULE, expected) <= TOLERANCE


def large_pool(dtype: torch.dtype = torch.float32, k: int = 3) -> fl.Pool:
    """Modules that are too large for a dense decomposition."""
    parts = [(gaussian(400, 6, seed=i, dtype=dtype), gaussian(6, 330, seed=20 + i, dtype=dtype), 0.7) for i in range(k)]
    return pools.make_pool(parts)


def dense_of(rule: Rule, pool: fl.Pool) -> Tensor:
    """The merged matrix, by a decomposition that keeps all of it."""
    return pools.exact(merged_by(rule, pool, dict.fromkeys(pool.names, 1.0), rank=330).updates[MODULE])


TIES = Rule(Largest(0.2), elect="total", divide="count")


def test_a_sketch_is_near_the_best_and_knows_its_error() -> None:
    pool = large_pool()
    M = dense_of(TIES, pool)
    sigma = torch.linalg.svdvals(M)
    for rank in (20, 100):
        cut = merged_by(TIES, pool, dict.fromkeys(NAMES, 1.0), rank=rank, min_energy=0.0)
        kept = float(cut.provenance["retained_energy"])  # type: ignore[arg-type]
        error = float((pools.exact(cut.updates[MODULE]) - M).square().sum() / M.square().sum())
        assert cut.updates[MODULE].rank == rank
        assert kept == pytest.approx(1 - error, abs=1e-6)  # float32 factors
        best = float(sigma[:rank].square().sum() / sigma.square().sum())
        assert best - 0.02 <= kept <= best + 1e-6  # one power step on a spectrum without a gap


def test_an_energy_finds_its_rank() -> None:
    pool = large_pool()
    sigma = torch.linalg.svdvals(dense_of(TIES, pool)).square()
    shares = sigma.cumsum(0) / sigma.sum()
    for energy in (0.5, 0.8, 0.99):
        cut = merged_by(TIES, pool, dict.fromkeys(NAMES, 1.0), energy=energy, min_energy=0.0)
        best = int((shares < energy).sum()) + 1
        assert float(cut.provenance["retained_energy"]) >= energy - 1e-9  # type: ignore[arg-type]
        assert best <= cut.updates[MODULE].rank <= 1.2 * best + 1


def test_what_was_of_low_rank_comes_back() -> None:
    """A sum has the rank of its terms: the sketch finds it, and nothing else."""
    pool = large_pool(torch.float64)
    cut = merged_by(Rule(), pool, dict.fromkeys(NAMES, 1.0), rank=30)
    assert cut.updates[MODULE].rank == 18 and cut.provenance["retained_energy"] == pytest.approx(1.0, abs=1e-12)
    assert mixed.distance(cut, MODULE, mixed.dense(pool, MODULE).sum(0)) <= TOLERANCE * 10


def test_losses_are_refused_with_a_way_out() -> None:
    pool = large_pool()
    said = r"rank 8 keeps 0\.\d+ of Σσ² of the merged ΔW \(the least 0\.\d+, of .*\), below min_energy=0\.9"
    with pytest.raises(fl.InputError, match=said) as refused:
        fl.merge(pool, method="ties", rank=8)
    accepted = float(str(refused.value).split("--min-energy ")[1].rstrip(")`"))
    assert fl.merge(pool, method="ties", rank=8, min_energy=accepted).updates[MODULE].rank == 8
    assert float(fl.merge(pool, method="ties", energy=0.9).provenance["retained_energy"]) >= 0.9  # type: ignore[arg-type]
    with pytest.raises(fl.InputError, match="method 'svd' does not take min_energy"):
        fl.merge(pool, method="svd", rank=8, min_energy=0.5)


@pytest.mark.parametrize("name", ["dare_ties", "della", "sce", "breadcrumbs"])
def test_results_depend_neither_on_threads_nor_on_the_pool(name: str, threads: Any) -> None:
    rule, pool = RULES[name][1], large_pool(torch.bfloat16)
    weights = {"a0": 1.0, "a1": 0.5, "a2": 2.0}
    found = []
    for count in (1, 2):
        threads(count)
        found.append(merged_by(rule, pool, weights, rank=20, min_energy=0.0))
    one, two = (pools.exact(a.updates[MODULE]) for a in found)
    if COMPILED:
        assert torch.equal(one, two)
    else:  # torch's products may be summed in another order on more threads
        assert mixed.distance(found[1], MODULE, one) <= 1e-5
    turned = merged_by(rule, pool.subset(["a2", "a0", "a1"]), weights, rank=20, min_energy=0.0)
    assert mixed.distance(turned, MODULE, one) <= 1e-5  # float32 sums in another order


def test_adapters_of_weight_zero_take_no_part() -> None:
    pool = large_pool()
    weights = {"a0": 1.0, "a1": 0.0, "a2": 2.0}
    whole = fl.merge(pool, weights, method="ties", rank=20, min_energy=0.0)
    part = fl.merge(pool.subset(["a0", "a2"]), weights={"a0": 1.0, "a2": 2.0}, method="ties", rank=20, min_energy=0.0)
    assert torch.equal(pools.exact(whole.updates[MODULE]), pools.exact(part.updates[MODULE]))
    nothing = fl.merge(pool, dict.fromkeys(NAMES, 0.0), method="ties", rank=20)
    assert nothing.updates[MODULE].rank == 0


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_sizes_beyond_float32(size: float) -> None:
    """Stored in float32, far from 1 on either side: nothing overflows, nothing is lost."""
    parts = [(gaussian(40, 3, seed=i) * size, gaussian(3, 30, seed=9 + i) * size, 1.0) for i in range(3)]
    plain = [(gaussian(40, 3, seed=i), gaussian(3, 30, seed=9 + i), 1.0) for i in range(3)]
    expected = pools.exact(fl.merge(pools.make_pool(plain), method="ties", rank=40).updates[MODULE])
    merged = fl.merge(pools.make_pool(parts), method="ties", rank=40)
    found = pools.exact(merged.updates[MODULE]) / size / size
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
