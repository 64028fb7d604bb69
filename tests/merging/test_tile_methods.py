"""Methods on elements by name, against dense definitions of their owners' formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mixed
import pools
import pytest
import test_tile_rules as owners
import torch
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.errors import InputError
from fastlora.ops.merge_tiles import bound_of

SEED, WEIGHTS = owners.SEED, owners.WEIGHTS


def peft_dare_ties(x: Tensor) -> Tensor:
    """PEFT's: masks over the density, plain votes, the weighted sum over the number that agree."""
    v = torch.stack([d * owners.drawn(i, (pools.N, pools.M), bound_of(0.4)) / 0.4 for i, d in enumerate(x)])
    agree = v.sign() == torch.where(v.sum(0) >= 0, 1.0, -1.0)
    return (owners.weighted(v, WEIGHTS) * agree).sum(0) / agree.sum(0).clamp(min=1)


def plain_breadcrumbs(x: Tensor) -> Tensor:
    size = x[0].numel()
    top = int(0.05 * size)
    kept = [d * (owners.first_of(d.abs(), top + int(0.4 * size)) & ~owners.first_of(d.abs(), top)) for d in x]
    return owners.weighted(torch.stack(kept), WEIGHTS).sum(0)


CASES: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("magnitude", {"density": 0.3}, owners.magnitude),
    ("dare", {"density": 0.4, "seed": SEED}, owners.dare_linear),
    ("dare", {"density": 0.4, "seed": SEED, "elect": "total"}, peft_dare_ties),
    ("dare", {"density": 0.4, "seed": SEED, "elect": "total", "convention": "mergekit"}, owners.dare_ties),
    ("della", {"density": 0.4, "epsilon": 0.1, "seed": SEED, "elect": "none"}, owners.della),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.05}, plain_breadcrumbs),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.05, "elect": "total"}, owners.breadcrumbs),
    ("sce", {"select_topk": 0.3}, owners.sce),
]


@pytest.mark.parametrize(("method", "options", "definition"), CASES, ids=[f"{m}-{len(o)}" for m, o, _ in CASES])
@pytest.mark.parametrize("kind", ["planted", "ragged", "with_zero"])
def test_methods_are_those_of_their_owners(
    kind: str, method: str, options: dict[str, Any], definition: Callable[[Tensor], Tensor]
) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    weights = None if method == "sce" else dict(zip(owners.NAMES, WEIGHTS, strict=True))
    merged = fl.merge(pool, weights, method=method, rank=40, **options)
    assert mixed.distance(merged, MODULE, definition(mixed.dense(pool, MODULE))) <= owners.TOLERANCE


def test_everything_is_kept_at_density_one() -> None:
    pool = pools.make_pool(pools.POOLS["planted"](3))
    total = mixed.dense(pool, MODULE).sum(0)
    for method, options in (
        ("magnitude", {"density": 1.0}),
        ("dare", {"density": 1.0}),
        ("dare", {"density": 1.0, "convention": "mergekit"}),
        ("della", {"density": 1.0, "epsilon": 0.0, "elect": "none", "combine": "sum"}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.0}),
    ):
        merged = fl.merge(pool, method=method, rank=40, **options)
        assert mixed.distance(merged, MODULE, total) <= owners.TOLERANCE, method


@pytest.mark.parametrize("convention", ["peft", "mergekit"])
def test_the_mean_of_dare_over_seeds_is_the_sum(convention: str) -> None:
    pool = pools.make_pool(pools.POOLS["planted"](3))
    total = mixed.dense(pool, MODULE).sum(0)
    count, density = 60, 0.5
    mean = torch.zeros_like(total)
    for seed in range(count):
        merged = fl.merge(pool, method="dare", rank=40, density=density, seed=seed, convention=convention)
        mean += pools.exact(merged.updates[MODULE]) / count
    # √((1 − d)/d / count) of the root of the sum of squares of all ΔW_i; a few of these.
    noise = float(mixed.dense(pool, MODULE).norm()) * ((1 - density) / density / count) ** 0.5
    assert float((mean - total).norm()) <= 1.5 * noise


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magnitude", {}, "needs density"),
        ("magnitude", {"density": 0.0}, "density=0 must be above 0"),
        ("dare", {"density": 1.5}, "density=1.5"),
        ("dare", {"density": 0.5, "convention": "paper"}, "convention='paper' does not exist"),
        ("della", {"density": 0.9}, "0.9 ± epsilon=0.15 must lie"),
        ("della", {"density": 0.5, "epsilon": -0.1}, "must lie"),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.0}, "gamma=1 must be"),
        ("sce", {"select_topk": 2.0}, "select_topk=2"),
        ("sce", {"select_topk": 0.5, "density": 0.5}, "does not take density"),
    ],
)
def test_parameters_out_of_range_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fl.merge(pools.make_pool(pools.POOLS["planted"](2)), method=method, rank=4, **options)
