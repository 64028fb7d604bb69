"""``sum``, ``mean``, ``matched_norm``, ``equal_energy``, ``metagpt``: numbers of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32, FLOAT64, GRAM64
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Extra

Deltas = Mapping[str, Tensor]
"""Weighted dense updates ``[k, n, m]`` by module."""


def norms(deltas: Deltas) -> Tensor:
    """Of all modules together: ``[k]``."""
    return torch.stack([x.flatten(1).square().sum(1) for x in deltas.values()]).sum(0).sqrt()


def matched(deltas: Deltas, weights: Tensor) -> Tensor:
    total = float(torch.stack([x.sum(0).square().sum() for x in deltas.values()]).sum().sqrt())
    sizes = norms(deltas)
    return (sizes > 0).double() * sizes[sizes > 0].mean() / total


def equal(deltas: Deltas, weights: Tensor) -> Tensor:
    own = norms(deltas) / weights.abs()  # of the ΔW_i themselves; NaN for a weight of 0
    inverse = torch.where(own > 0, 1 / own, 0.0)
    return inverse / inverse.sum()


def meta(deltas: Deltas, weights: Tensor) -> Tensor:
    return norms(deltas).square() / norms(deltas).square().sum()


DEFINITIONS: dict[str, tuple[dict[str, Any], Callable[[Deltas, Tensor], Tensor]]] = {
    "sum": ({"strength": -0.7}, lambda deltas, weights: torch.full_like(weights, -0.7)),
    "mean": ({}, lambda deltas, weights: torch.ones_like(weights) / weights.sum()),
    "matched_norm": ({}, matched),
    "equal_energy": ({}, equal),
    "metagpt": ({}, meta),
}
"""Parameters, and what every ``w_i ΔW_i`` is multiplied by."""


def expected(method: str, pool: fl.Pool, weights: Mapping[str, float]) -> dict[str, Tensor]:
    deltas = {m: mixed.dense(pool, m, weights) for m in pool.modules}
    given = torch.tensor([weights.get(n, 0.0) for n in pool.names], dtype=torch.float64)
    shares = DEFINITIONS[method][1](deltas, given)
    return {m: (shares[:, None, None] * x).sum(0) for m, x in deltas.items()}


@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("kind", pools.POOLS)
def test_float64_pools(method: str, kind: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    weights = {"a0": 0.5, "a1": -1.0, "a2": 2.0}
    merged = fl.merge(pool, weights, method=method, **DEFINITIONS[method][0])
    assert mixed.distance(merged, MODULE, expected(method, pool, weights)[MODULE]) <= GRAM64
    assert merged.name == method and merged.updates[MODULE].rank <= sum(a.updates[MODULE].rank for a in pool.adapters)


@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_ragged_pools_with_gaps(method: str, dtype: torch.dtype | None) -> None:
    """All dtypes, a zero adapter, one of weight 0, ranks of 0, modules that some lack."""
    pool = mixed.mixed_pool(dtype=dtype)
    merged = fl.merge(pool, mixed.WEIGHTS, method=method, **DEFINITIONS[method][0])
    wanted = expected(method, pool, mixed.WEIGHTS)
    assert merged.modules == pool.modules
    for module in pool.modules:
        assert mixed.distance(merged, module, wanted[module]) <= FLOAT32, module


@pytest.mark.parametrize("method", ["matched_norm", "equal_energy"])
def test_weights_of_that_name_are_the_same(method: str) -> None:
    pool = pools.make_pool(pools.with_zero(3))
    found = fl.merge(pool, method=method).provenance["coefficients"]
    assert found == pytest.approx(fl.weights(pool, method), rel=FLOAT64)


@pytest.mark.parametrize("method", DEFINITIONS)
def test_biases_take_the_weights_of_the_updates(method: str) -> None:
    pool = pools.make_pool(pools.planted(2))
    biased = fl.Pool(
        fl.Adapter(a.name, a.updates, extras={f"{MODULE}.lora_bias": Extra("delta", torch.full((2,), i + 1.0))})
        for i, a in enumerate(pool.adapters)
    )
    weights = {"a0": 0.5, "a1": 2.0}
    merged = fl.merge(biased, weights, method=method, **DEFINITIONS[method][0])
    given = torch.tensor(list(weights.values()), dtype=torch.float64)
    shares = given * DEFINITIONS[method][1]({MODULE: mixed.dense(pool, MODULE, weights)}, given)
    wanted = float(shares @ torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert merged.extras[f"{MODULE}.lora_bias"].tensor.tolist() == pytest.approx([wanted] * 2, rel=FLOAT32)


@pytest.mark.parametrize("method", ["matched_norm", "equal_energy", "metagpt"])
def test_they_can_be_cut(method: str) -> None:
    pool = pools.make_pool(pools.planted(3))
    whole = expected(method, pool, dict.fromkeys(pool.names, 1.0))[MODULE]
    merged = fl.merge(pool, method=method, rank=2)
    assert merged.updates[MODULE].rank == 2
    assert mixed.distance(merged, MODULE, mixed.truncated(whole, 2)) <= FLOAT32
    assert 0 < merged.provenance["retained_energy"] < 1  # type: ignore[operator]


@pytest.mark.parametrize("method", ["matched_norm", "equal_energy", "metagpt"])
def test_nothing_stays_nothing(method: str) -> None:
    pool = pools.make_pool(pools.planted(2))
    merged = fl.merge(pool, {}, method=method)
    assert merged.updates[MODULE].rank == 0


def test_what_is_refused() -> None:
    part = pools.planted(1)[0]
    pool = pools.make_pool([part, (-part[0], part[1], part[2])])
    with pytest.raises(fl.InputError, match="matched_norm: needs a sum that is not zero, but these adapters cancel"):
        fl.merge(pool, method="matched_norm")
    with pytest.raises(fl.InputError, match=r"method 'mean': the weights \[1.0, -1.0\] add up to 0"):
        fl.merge(pool, {"a0": 1.0, "a1": -1.0}, method="mean")
    with pytest.raises(fl.InputError, match="overflow: lower the weights"):
        fl.merge(pool, {"a0": 1e200}, method="metagpt")
    with pytest.raises(fl.InputError, match="method 'mean' does not take rank: it takes no parameters"):
        fl.merge(pool, method="mean", rank=2)
