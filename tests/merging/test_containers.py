"""``core``, ``knots``, ``ctm``: elementwise rules in common bases, against dense matrices in the papers' bases."""

from __future__ import annotations

import math
from typing import Any

import mixed
import numpy as np
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32, FLOAT64, SUBSPACE64
from torch import Tensor

import fastlora as fl
from fastlora.merging.forms.elementwise import Elementwise
from fastlora.ops.merge_tiles import key_of
from fastlora.reference.philox import words
from fastlora.runtime import memory

NULL = 1e-6  # stored numbers are exact: what is below is rounding of the arithmetic


def by_elements(stack: Tensor, rule: str, density: float, combine: str) -> Tensor:
    """Of ``[k, p, q]``, as in TIES, by loops over adapters."""
    if rule == "sum":
        return stack.sum(0)
    kept = []
    for matrix in stack:
        count = math.floor(density * matrix.numel())
        least = matrix.abs().flatten().sort(descending=True).values[count - 1] if count else torch.inf
        kept.append(torch.where(matrix.abs() >= least, matrix, 0.0))
    total = torch.stack(kept).sum(0)
    if rule == "magnitude":
        return total
    signs = torch.where(total < 0, -1.0, 1.0)
    agreeing = [torch.where(matrix.sign() == signs, matrix, 0.0) for matrix in kept]
    number = sum((matrix != 0).double() for matrix in agreeing)
    return sum(agreeing) / (torch.clamp(number, min=1) if combine == "mean" else 1)  # type: ignore[type-var, return-value]


def columns(matrix: Tensor, most: int | None = None) -> Tensor:
    """Left singular vectors that are no rounding."""
    U, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, : min(int((sigma > NULL * sigma[0]).sum()), most or len(sigma))]


def core(rule: str, density: float, combine: str = "mean") -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        U, V = columns(torch.cat(list(deltas), 1)), columns(torch.cat(list(deltas)).mT)
        return U @ by_elements(U.mT @ deltas @ V, rule, density, combine) @ V.mT

    return merged


def knots(rule: str, density: float, combine: str = "mean") -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        U = columns(torch.cat(list(deltas), 1))
        return U @ by_elements(U.mT @ deltas, rule, density, combine)

    return merged


def ctm(rank: int, balance: float, rule: str, density: float) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        norms = deltas.flatten(1).norm(dim=1)
        if not norms.any():
            return torch.zeros_like(deltas[0])
        wanted = balance * norms + (1 - balance) * norms[norms > 0].mean()
        blended = deltas * torch.where(norms > 0, wanted / norms, 0.0)[:, None, None]
        U, V = columns(torch.cat(list(blended), 1), rank), columns(torch.cat(list(blended)).mT, rank)
        before = math.inf
        for _ in range(1000):
            U = columns(torch.cat([x @ V for x in blended], 1), rank)
            V = columns(torch.cat([x.mT @ U for x in blended], 1), rank)
            error = float((1 - (U.mT @ blended @ V).square().sum() / blended.square().sum()).clamp(min=0).sqrt())
            if abs(before - error) < 1e-6:
                break
            before = error
        return U @ by_elements(U.mT @ deltas @ V, rule, density, "mean") @ V.mT

    return merged


RULES: list[dict[str, Any]] = [
    {"rule": "ties", "density": 0.2, "combine": "mean"}, {"rule": "ties", "density": 0.7, "combine": "sum"},
    {"rule": "ties", "density": 1.0, "combine": "mean"}, {"rule": "magnitude", "density": 0.3},
]  # fmt: skip
# Updates of one size in separate spaces: singular values that are equal, and directions that are not unique.
NOT_UNIQUE = ("orthogonal",)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_core(rule: dict[str, Any]) -> None:
    mixed.require_parity("core", core(**rule), FLOAT32, without=NOT_UNIQUE, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_knots(rule: dict[str, Any]) -> None:
    mixed.require_parity("knots", knots(**rule), FLOAT32, without=NOT_UNIQUE, **rule)


@pytest.mark.parametrize(("rank", "balance", "rule", "density"), [
    (4, 0.25, "sum", None), (3, 1.0, "ties", 0.25), (5, 0.0, "ties", 0.6), (6, 0.25, "magnitude", 0.25),
])  # fmt: skip
def test_ctm(rank: int, balance: float, rule: str, density: float | None) -> None:
    given = {"rank": rank, "balance": balance, "rule": rule} | ({} if density is None else {"density": density})
    # Subspaces of so little gap that the iterations end before they have one value.
    slow = NOT_UNIQUE
    mixed.require_parity("ctm", ctm(rank, balance, rule, density or 1.0), FLOAT32, without=slow, **given)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_rules_are_those_of_peft(density: float) -> None:
    """On elements that differ, where its exact count and our threshold keep the same."""
    owner = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    stack = torch.randn(4, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one = torch.ones(4, dtype=torch.float64)
    for rule, expected in (
        ("ties", owner.ties(list(stack), one, density)),
        ("magnitude", owner.magnitude_prune(list(stack), one, density)),
    ):
        elementwise = Elementwise("core", rule, density, "mean", 0)
        threshold = elementwise.thresholds(stack.flatten(1), torch.full((4,), 63))
        found = elementwise.of(stack, threshold, ["a", "b", "c", "d"], MODULE)
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
@pytest.mark.parametrize("method", ["core", "knots"])
def test_random_masks(method: str, rule: str) -> None:
    """By the words of the elements' numbers, adapter by adapter; every piece of the rows has its own numbers."""
    parts, density, seed = pools.ragged(3), 0.3, 5
    pool = pools.make_pool(parts)
    deltas = torch.stack([pools.dense(p) for p in parts])
    U, V = columns(torch.cat(list(deltas), 1)), columns(torch.cat(list(deltas)).mT)
    # A mask belongs to the rows of the basis; signs of its vectors change none.
    inside = U.mT @ deltas @ V if method == "core" else U.mT @ deltas
    numbers = np.arange(inside.shape[1])[:, None] * 2**32 + np.arange(inside.shape[2])
    kept = torch.stack([
        torch.from_numpy(words(numbers, key_of(seed, name), key_of(MODULE)).astype(np.int64) < int(density * 2**32))
        for name in pool.names
    ])  # fmt: skip
    left = torch.where(kept, inside / density, 0.0)
    whole = left.sum(0) if rule == "dare" else by_elements(left, "ties", 1.0, "mean")
    expected = U @ whole @ V.mT if method == "core" else U @ whole
    found = fl.merge(pool, method=method, rule=rule, density=density, seed=seed)
    assert mixed.distance(found, MODULE, expected) <= FLOAT32
    with memory.bounded(1):  # column by column
        pieces = fl.merge(pool, method=method, rule=rule, density=density, seed=seed)
    assert mixed.distance(pieces, MODULE, expected) <= FLOAT32
    assert mixed.distance(fl.merge(pool, method=method, rule=rule, density=density), MODULE, expected) > 0.1
    everything = fl.merge(pool, method=method, rule="dare", density=1.0)
    assert mixed.distance(everything, MODULE, deltas.sum(0)) <= FLOAT32


@pytest.mark.parametrize("method", ["core", "knots"])
def test_the_sum_needs_no_container(method: str) -> None:
    def total(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        return deltas.sum(0)

    mixed.require_parity(method, total, FLOAT32, rule="sum")
    if method == "core":
        mixed.require_parity(method, total, FLOAT32, rule="magnitude", density=1.0, gauge="raw")


def test_raw_bases_are_those_of_the_stored_factors() -> None:
    """Those of the paper, without scalings; and the updates alone do not say what they are."""
    parts = pools.ragged(3)
    deltas = torch.stack([pools.dense(p) for p in parts])
    U, V = columns(torch.cat([b for b, _, _ in parts], 1)), columns(torch.cat([a for _, a, _ in parts]).mT)
    expected = U @ by_elements(U.mT @ deltas @ V, "ties", 0.2, "mean") @ V.mT
    found = fl.merge(pools.make_pool(parts), method="core", gauge="raw")
    assert mixed.distance(found, MODULE, expected) <= FLOAT32
    b, a, s = parts[0]
    parts[0] = (b @ pools.mixing(b.shape[1], 5, 30.0), torch.linalg.inv(pools.mixing(b.shape[1], 5, 30.0)) @ a, s)
    moved = pools.make_pool(parts)
    assert mixed.distance(fl.merge(moved, method="core", gauge="raw"), MODULE, expected) > 0.01
    free = pools.exact(fl.merge(pools.make_pool(pools.ragged(3)), method="core").updates[MODULE])
    assert mixed.distance(fl.merge(moved, method="core"), MODULE, free) <= FLOAT32


def test_ctm_with_all_directions_loses_nothing() -> None:
    pool = pools.make_pool(pools.planted(3))
    total = mixed.dense(pool, MODULE).sum(0)
    assert mixed.distance(fl.merge(pool, method="ctm", rank=18, rule="sum"), MODULE, total) <= SUBSPACE64
    assert fl.merge(pool, method="ctm").updates[MODULE].rank == 6  # the largest of the pool


def test_results_can_be_cut() -> None:
    pool = pools.make_pool(pools.planted(3))
    for method in ("core", "knots"):
        whole, cut = fl.merge(pool, method=method), fl.merge(pool, method=method, rank=3)
        matrix = pools.exact(whole.updates[MODULE])
        sigma = torch.linalg.svdvals(matrix)
        error = float((pools.exact(cut.updates[MODULE]) - matrix).norm())
        assert cut.updates[MODULE].rank == 3 and error == pytest.approx(float(sigma[3:].norm()), rel=FLOAT32)
        kept = float(sigma[:3].square().sum() / sigma.square().sum())
        assert cut.provenance["retained_energy"] == pytest.approx(kept, rel=FLOAT32)


@pytest.mark.parametrize(("method", "parameters", "said"), [
    ("core", {"density": 0.0}, "core: density=0 must be above 0 and at most 1"),
    ("knots", {"density": 1.5}, "knots: density=1.5 must be"), ("ctm", {"density": -1.0}, "ctm: density=-1 must be"),
    ("ctm", {"balance": 2.0}, "ctm: balance=2 must be between 0 and 1"),
    ("ctm", {"energy": 0.5}, "method 'ctm' does not take energy"),
    ("core", {"rule": "della"}, "rule='della' does not exist: use one of sum, magnitude, ties, dare, dare_ties"),
    ("knots", {"rank": 0}, "rank=0 must be at least 1"),
])  # fmt: skip
def test_parameters_that_are_refused(method: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(fl.InputError, match=said):
        fl.merge(pools.make_pool(pools.planted(2)), method=method, **parameters)
