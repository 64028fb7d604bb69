"""Our methods beside PEFT's functions on the same ``ΔW_i``."""

from __future__ import annotations

from typing import Any

import mixed
import owners
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT64

import fastlora as fl

WEIGHTS = (0.5, -1.0, 2.0)
SEED = 7
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("cat", {}, "task_arithmetic", {}),
    *[
        (method, {"density": density, "rank": 40, **more}, function, {"density": density, **theirs})
        for density in (0.05, 0.4)
        for method, more, function, theirs in (
            ("magnitude", {}, "magnitude_prune", {}),
            ("ties", {}, "ties", {}),
            ("ties", {"elect": "frequency"}, "ties", {"majority_sign_method": "frequency"}),
            ("dare", {"seed": SEED}, "dare_linear", {}),
            ("dare", {"seed": SEED, "elect": "total"}, "dare_ties", {}),
            ("dare", {"seed": SEED, "elect": "frequency"}, "dare_ties", {"majority_sign_method": "frequency"}),
        )
    ],
]


@pytest.mark.parametrize("kind", ["planted", "ragged", "with_zero", "duplicates"])
@pytest.mark.parametrize(
    ("method", "given", "function", "theirs"), CASES, ids=[f"{f}-{i}" for i, (_, _, f, _) in enumerate(CASES)]
)
def test_it_is_that_of_peft(
    kind: str,
    method: str,
    given: dict[str, Any],
    function: str,
    theirs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = owners.module("peft.utils.merge_utils")
    pool = pools.make_pool(pools.POOLS[kind](3))
    merged = fl.merge(pool, dict(zip(pool.names, WEIGHTS, strict=True)), method=method, **given)
    monkeypatch.setattr(torch, "bernoulli", owners.drawn(pool.names, MODULE, SEED))
    deltas = list(mixed.dense(pool, MODULE))
    expected = getattr(owner, function)(deltas, torch.tensor(WEIGHTS, dtype=torch.float64), **theirs)
    assert mixed.distance(merged, MODULE, expected) <= FLOAT64
