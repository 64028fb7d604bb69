"""Lazy updates beside stored and empty ones.

Whoever reads inner products must find the same in a lazy update and in the same update as stored matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from structures import (
    EMPTY,
    MODULES,
    STRUCTURES,
    adapter,
    as_stored,
    delta,
    pool_of,
    random_mix,
    stored,
    total,
    zero_of,
)
from tolerances import FLOAT32, SUBSPACE64
from torch import Tensor

import fastlora as fl


def deltas(found: fl.Adapter) -> list[Tensor]:
    return [delta(found.updates[m]) for m in MODULES]


def every(parts: dict[str, fl.Adapter]) -> list[Tensor]:
    return [d for part in parts.values() for d in deltas(part)]


READERS: dict[str, Callable[[fl.Pool], list[Tensor]]] = {
    "inner": lambda p: [fl.PoolGram(p).inner(m) for m in MODULES],
    "overlap": lambda p: [
        torch.nan_to_num(x, -7.0) for pair in fl.overlap(p, modules=True).modules.values() for x in pair
    ],
    "svd": lambda p: deltas(fl.merge(p, rank=8)),
    "svd of a PoolGram": lambda p: deltas(fl.PoolGram(p).merge(rank=8)),
    "cut": lambda p: deltas(fl.merge(p, energy=0.9)),
    "iso_c": lambda p: deltas(fl.merge(p, method="iso_c", rank=3)),
    "ties": lambda p: deltas(fl.merge(p, method="ties", rank=8)),
    "cat": lambda p: deltas(fl.merge(p, method="cat")),
    "compress": lambda p: [d for a in p.adapters for d in deltas(a.compress(2))],
    "product of a PoolGram": lambda p: every(fl.PoolGram(p).decompose(0.5).adapters()),
    "product": lambda p: every(fl.decompose(p, 0.5).adapters()),
    "palindrome": lambda p: every(fl.decompose(p, 0.5, chain="palindrome").adapters()),
    "mean": lambda p: every(fl.decompose(p, 0.8, chain="mean").adapters()),
    "right": lambda p: every(fl.decompose(p, 0.5, side="right").adapters()),
    "pairs": lambda p: every(fl.decompose(p, 0.5, mode="pairs").adapters()),
    "iterative": lambda p: every(fl.decompose(p, 0.5, mode="iterative", target="a0").adapters()),
    "control": lambda p: every(fl.control(fl.decompose(p, 0.8, chain="mean"), "top")),
    "columns": lambda p: deltas(fl.modulate(p["a0"], fl.dipm.interpolate(p["a1"], 0.5))),
    "matrix": lambda p: deltas(fl.modulate(p["a0"], fl.dipm.remove(p["a1"]), granularity="matrix")),
    "components": lambda p: deltas(fl.modulate(p["a0"], fl.dipm.interpolate(p["a1"], 0.5), granularity="component")),
    "equal energy": lambda p: [torch.tensor(list(fl.weights(p, "equal_energy").values()))],
    "matched norm": lambda p: [torch.tensor(list(fl.weights(p, "matched_norm").values()))],
    "least interference": lambda p: [torch.tensor(list(fl.weights(p).values()))],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(8))
def test_lazy_updates_are_what_they_are_stored(seed: int, reader: str) -> None:
    kinds, mix = random_mix(seed)
    found = READERS[reader](pool_of(mix))
    wanted = READERS[reader](pool_of([{m: as_stored(u) for m, u in updates.items()} for updates in mix]))
    size = max(float(x.norm()) for x in wanted)
    for place, (x, y) in enumerate(zip(found, wanted, strict=True)):
        # Two of the methods keep their results in float32, unless a stored matrix is float64.
        assert float((x - y).norm()) <= (FLOAT32 if reader in ("ties", "columns") else SUBSPACE64) * size, (
            place,
            kinds,
        )


@pytest.mark.parametrize("seed", range(8))
def test_inner_products_are_the_dense_ones(seed: int) -> None:
    kinds, mix = random_mix(seed)
    gram = fl.PoolGram(pool_of(mix))
    for g, module in enumerate(MODULES):
        dense = [delta(updates[module]).flatten() for updates in mix]
        dense = [torch.zeros_like(d) if kind in EMPTY else d for d, kind in zip(dense, kinds[g], strict=True)]
        wanted = torch.stack(dense) @ torch.stack(dense).mT
        size = max(float(wanted.diagonal().max()), 1.0)
        assert float((gram.inner(module) - wanted).abs().max()) <= SUBSPACE64 * size, kinds[g]


@pytest.mark.parametrize("kind", sorted(EMPTY))
@pytest.mark.parametrize("beside", ["stored", "sum of two", "sum of three", "unique"])
def test_an_empty_update_changes_nothing(kind: str, beside: str) -> None:
    """It has norm 0, weight 0 and no direction, whatever stands beside it."""
    mixed, plain, empty = STRUCTURES[beside](500), stored(510), STRUCTURES[kind](520)
    pool = fl.Pool([adapter("mixed", mixed), adapter("plain", plain), adapter("empty", empty)])
    others = fl.Pool([pool["mixed"], pool["plain"]])
    gram = fl.PoolGram(pool)
    assert gram.norms()["empty"] == 0.0
    torch.testing.assert_close(gram.inner()[:2, :2], fl.PoolGram(others).inner(), rtol=SUBSPACE64, atol=0.0)
    assert torch.nan_to_num(fl.overlap(pool).cosine)[:2, 2].tolist() == [0.0, 0.0]
    for method in ("equal_energy", "least_interference"):
        found, wanted = fl.weights(pool, method), fl.weights(others, method)
        assert found == pytest.approx(wanted | {"empty": 0.0}, rel=SUBSPACE64, abs=SUBSPACE64)
    for chain in ("product", "palindrome"):
        assert float(fl.decompose(pool, 0.2, chain=chain).shared.delta("m").norm()) == 0.0
    found_parts, parts = fl.decompose(pool, 0.6, chain="mean"), fl.decompose(others, 0.9, chain="mean")
    for part, other in ((found_parts, parts),):
        for name in ("mixed", "plain"):
            x, y = delta(part.unique_of(name).updates["m"]), delta(other.unique_of(name).updates["m"])
            assert float((x - y).norm()) <= SUBSPACE64 * float(delta(pool[name].updates["m"]).norm())


def test_what_cancels_is_empty() -> None:
    one, other = stored(100), stored(210)
    assert zero_of(100).rank == 0
    left = total((0.3, one), (1.0, other), (-0.3, one))
    assert left.rank == other.rank and torch.equal(delta(left), delta(other))
    assert total((1.0, one), (1.0, one)).rank == 2 * one.rank  # ranks add up where nothing cancels
    both = total((1.0, one), (2.0, other))
    assert total((1.0, both), (-1.0, one), (-2.0, other)).rank == 0
    rest = total((0.5, both), (-0.5, one))
    assert rest.rank == other.rank and torch.equal(delta(rest), delta(other))
    assert total((1.0, both), (-2.0, other), (3.0, one)).rank == 2 * one.rank
    nothing = adapter("x", one) + adapter("y", other) - adapter("x", one) - adapter("y", other)
    assert nothing.updates["m"].rank == 0
    scaled = replace(one, scaling=2.0)
    assert total((1.0, one), (-0.5, scaled)).rank == 0
