"""Weights that differ by module: every method has, in a module, what it would have with the module's weights."""

from __future__ import annotations

from typing import Any

import merge_calls
import parity
import pools
import pytest
from builders import gaussian
from parity_pools import Given
from tolerances import FLOAT32

import fastlora as fl
from fastlora.core.data import Extra
from fastlora.errors import InputError
from fastlora.merging.by_module import OF_ALL_MODULES, merge_by_module

SHAPES = {"layers.0.q": (9, 7), "layers.1.q": (9, 7), "layers.0.v": (5, 8)}
TABLE = {"layers.0.q": (0.7, -0.2, 1.1), "layers.1.q": (0.5, 1.0, 0.3), "layers.0.v": (0.7, -0.2, 1.1)}
REFUSED = ("equal_energy",)


def pool_of(name: str) -> fl.Pool:
    alike = name in merge_calls.OF_EQUALS
    adapters = [
        pools.make_adapter(f"a{i}", {
            m: (gaussian(n, rank, seed=9 * i + j), gaussian(rank, k, seed=70 + 9 * i + j), 0.5 if alike else 0.5 + i)
            for j, (m, (n, k)) in enumerate(SHAPES.items())
            if alike or (i, j) != (1, 1)
        })
        for i, rank in enumerate((3, 3, 3) if alike else (3, 2, 4))
    ]  # fmt: skip
    return fl.Pool(adapters[:2] if name in merge_calls.OF_TWO else adapters)


def table_of(pool: fl.Pool) -> dict[str, dict[str, float]]:
    return {name: {m: row[i] for m, row in TABLE.items()} for i, name in enumerate(pool.names)}


@pytest.mark.parametrize("method", [m for m in fl.methods() if m not in (*OF_ALL_MODULES, *REFUSED)])
def test_every_module_has_its_own_weights(method: str) -> None:
    """A method that looks at all modules together fails here: its name is missing in ``by_module``."""
    pool = pool_of(method)
    given: dict[str, Any] = {**merge_calls.parameters_of(method), "data": merge_calls.data_of(method, pool)}
    merged = merge_by_module(pool, table_of(pool), method, **given)
    assert merged.name == method and merged.modules == pool.modules
    for module in pool.modules:
        weights = dict(zip(pool.names, TABLE[module], strict=False))
        expected = pools.exact(fl.merge(pool, weights, method=method, **given).updates[module])
        error = float((pools.exact(merged.updates[module]) - expected).norm())
        assert error <= FLOAT32 * float(expected.norm()), module


@pytest.mark.parametrize("method", OF_ALL_MODULES)
def test_methods_of_all_modules_see_the_weighted_updates(method: str) -> None:
    pool = pool_of(method)
    table = table_of(pool)
    weighted = fl.Pool(
        pools.make_adapter(a.name, {
            m: (*(f.terms[0].source for f in (u.B, u.A)), table[a.name][m] * u.scaling) for m, u in a.updates.items()
        })
        for a in pool.adapters
    )  # fmt: skip
    parameters, definition = parity.CASES[method][0]
    given = Given(weighted, dict.fromkeys(pool.names, 1.0), None, dict.fromkeys(pool.modules, 1e-6))
    expected = definition(given)
    merged = merge_by_module(pool, table, method, **parameters)
    for module in pool.modules:
        error = float((pools.exact(merged.updates[module]) - expected[module]).norm())
        assert error <= FLOAT32 * float(expected[module].norm()), module


@pytest.mark.parametrize(("method", "given"), [
    ("equal_energy", {}), ("ties", {"scope": "model", "rank": 3}), ("ties", {"convention": "paper", "rank": 3}),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(method: str, given: dict[str, Any]) -> None:
    pool = pool_of(method)
    with pytest.raises(InputError, match=f"no meaning for '{method}' of the whole model"):
        merge_by_module(pool, table_of(pool), method, **given)
    if method == "ties":
        given = {**given, "scope": "module", "min_energy": 0.0}
        merge_by_module(pool, table_of(pool), method, **given)


def test_the_energy_is_that_of_all_modules() -> None:
    """Of the groups together, and so is the least that may be kept."""
    pool = pool_of("ties")
    table = table_of(pool)
    for method, given in (("svd", {"rank": 2}), ("ties", {"rank": 3, "min_energy": 0.0})):
        merged = merge_by_module(pool, table, method, **given)  # type: ignore[arg-type]
        kept, total = 0.0, 0.0
        for module in pool.modules:
            whole = {**given, "rank": 12}
            weights = dict(zip(pool.names, TABLE[module], strict=True))
            matrix = pools.exact(fl.merge(pool, weights, method=method, **whole).updates[module])  # type: ignore[arg-type]
            kept += float(pools.exact(merged.updates[module]).square().sum())
            total += float(matrix.square().sum())
        assert merged.provenance["retained_energy"] == pytest.approx(kept / total, rel=FLOAT32)
        assert list(merged.details["retained_energy"]) == pool.modules  # type: ignore[call-overload]
        assert merged.provenance["parameters"].get("min_energy") == given.get("min_energy")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"rank 1 keeps 0\.\d+ of Σσ² of the merged ΔW .*below min_energy=0\.9"):
        merge_by_module(pool, table, "ties", rank=1)
    assert "min_energy" not in merge_by_module(pool, table, "ties", rank=9).provenance["parameters"]  # type: ignore[operator]


def test_the_default_rank_is_that_of_the_pool() -> None:
    """Not of a group of modules, which may have smaller ones."""
    pool = pool_of("svd")
    parts = {"layers.0.q": (gaussian(9, 6, seed=1), gaussian(6, 7, seed=2), 1.0)}
    wide = fl.Pool([*pool.adapters[:2], pools.make_adapter("a2", parts)])
    merged = merge_by_module(wide, table_of(wide), "svd")
    assert merged.updates["layers.0.q"].rank == 6


def test_biases_take_the_weights_of_their_module() -> None:
    import torch

    pool = pool_of("cat")
    biased = fl.Pool(
        fl.Adapter(a.name, a.updates, extras={f"{m}.lora_bias": Extra("delta", torch.ones(2)) for m in a.updates})
        for a in pool.adapters
    )
    for method in ("cat", "pico"):
        merged = merge_by_module(biased, table_of(pool), method, **({"scale": "none"} if method == "pico" else {}))
        for module in pool.modules:
            weights = [w for i, w in enumerate(TABLE[module]) if i in pool.present(module)]
            assert merged.extras[f"{module}.lora_bias"].tensor.tolist() == pytest.approx([sum(weights)] * 2)
    head = fl.Pool(
        fl.Adapter(a.name, a.updates, extras={"norm.weight": Extra("delta", torch.ones(2))}) for a in pool.adapters
    )
    with pytest.raises(InputError, match=r"has norm\.weight beside its updates"):
        merge_by_module(head, table_of(pool), "cat")
