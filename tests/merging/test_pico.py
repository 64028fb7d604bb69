"""``pico`` against its definition on dense matrices, and on the stored factors."""

from __future__ import annotations

from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Extra


def corrected(total: Tensor, gram: Tensor, count: int) -> Tensor:
    """``U diag(α) Uᵀ X``."""
    values, U = torch.linalg.eigh(gram)
    shares = values.clamp(min=0) / max(float(values.clamp(min=0).sum()), 1e-300)
    return (U / (1 + (count - 1) * shares)) @ U.mT @ total


def plain(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
    count = int((deltas.flatten(1).norm(dim=1) > 0).sum())
    return corrected(deltas.sum(0), (deltas @ deltas.mT).sum(0), count)


def test_without_its_scale_it_is_the_definition() -> None:
    mixed.require_parity("pico", plain, FLOAT32, scale="none")


def test_the_scale_is_that_of_all_modules() -> None:
    pool = mixed.mixed_pool()
    deltas = {m: mixed.dense(pool, m, mixed.WEIGHTS) for m in pool.modules}
    norms = sum(x.flatten(1).square().sum(1) for x in deltas.values()).sqrt()  # type: ignore[union-attr]
    results = {m: plain(x, torch.ones(5), 0.0) for m, x in deltas.items()}
    length = sum(float(x.square().sum()) for x in results.values()) ** 0.5
    gamma = float(norms[norms > 0].mean()) / length
    merged = fl.merge(pool, mixed.WEIGHTS, method="pico")
    assert merged.provenance["scale"] == pytest.approx(gamma, rel=FLOAT32)
    assert merged.provenance["parameters"] == {"gauge": "free", "scale": "matched"}
    for module, result in results.items():
        assert mixed.distance(merged, module, gamma * result) <= FLOAT32
    whole = sum(float(pools.exact(u).square().sum()) for u in merged.updates.values()) ** 0.5
    assert whole == pytest.approx(float(norms[norms > 0].mean()), rel=FLOAT32)


@pytest.mark.parametrize("kind", pools.POOLS)
def test_raw_directions_are_those_of_the_stored_factors(kind: str) -> None:
    parts = pools.POOLS[kind](3)
    total = sum(w * pools.dense(p) for w, p in zip((0.5, -1.0), parts[:2], strict=True))
    gram = sum(b.double() @ b.double().mT for b, _, _ in parts[:2])
    count = sum(bool(pools.dense(p).any()) for p in parts[:2])
    found = fl.merge(pools.make_pool(parts), {"a0": 0.5, "a1": -1.0}, method="pico", gauge="raw", scale="none")
    expected = corrected(total, gram, count)  # type: ignore[arg-type]
    error = float((pools.exact(found.updates[MODULE]) - expected).norm())
    assert error <= FLOAT32 * max(float(pools.dense(p).norm()) for p in parts)


@pytest.mark.parametrize("parameters", [{}, {"gauge": "raw"}, {"scale": "none"}], ids=str)
def test_one_adapter_stays(parameters: dict[str, Any]) -> None:
    part = pools.planted(1)[0]
    found = fl.merge(pools.make_pool([part]), method="pico", **parameters)
    assert mixed.distance(found, MODULE, pools.dense(part)) <= FLOAT32


def test_biases_take_the_scale_and_results_can_be_cut() -> None:
    pool = pools.make_pool(pools.planted(2))
    biased = fl.Pool(
        fl.Adapter(a.name, a.updates, extras={f"{MODULE}.lora_bias": Extra("delta", torch.full((2,), i + 1.0))})
        for i, a in enumerate(pool.adapters)
    )
    merged = fl.merge(biased, method="pico", rank=2)
    gamma = merged.provenance["scale"]
    assert merged.extras[f"{MODULE}.lora_bias"].tensor.tolist() == pytest.approx([3 * gamma] * 2, rel=FLOAT32)  # type: ignore[operator, list-item]
    assert merged.updates[MODULE].rank == 2 and 0 < merged.provenance["retained_energy"] < 1  # type: ignore[operator]
    whole = pools.exact(fl.merge(pool, method="pico").updates[MODULE])
    assert mixed.distance(merged, MODULE, mixed.truncated(whole, 2)) <= FLOAT32
