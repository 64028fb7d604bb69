"""Pools of adapters of few recipes: what two of a recipe have in common with the others, the rest has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.errors import FastloraError

Shapes = Mapping[str, tuple[int, int, int]]
"""``{module: (out, in, rank)}``."""

BLOCK = "model.layers.0.self_attn"
PLAIN: Shapes = {f"{BLOCK}.q_proj": (24, 16, 2), f"{BLOCK}.v_proj": (8, 16, 2)}


def prefixed(prefix: str) -> Shapes:
    return {f"{prefix}{module}": shape for module, shape in PLAIN.items()}


POOLS: dict[str, list[Shapes]] = {
    "one recipe": [PLAIN],
    "two ranks": [PLAIN, {m: (n, k, 3) for m, (n, k, _) in PLAIN.items()}],
    "other modules too": [PLAIN, {**PLAIN, f"{BLOCK}.o_proj": (16, 24, 2)}],
    "other shapes": [PLAIN, {m: (n, k + 1, 2) for m, (n, k, _) in PLAIN.items()}],
    "other shapes and ranks": [PLAIN, {m: (n, k + 1, 3) for m, (n, k, _) in PLAIN.items()}],
    "a wrapper's names": [PLAIN, prefixed("model.")],
    "nothing in common": [PLAIN, {"visual.blocks.3.attn.proj": (7, 5, 2)}],
    "fused and in parts": [PLAIN, {f"{BLOCK}.qkv_proj": (40, 16, 2)}],
    "both in one": [{**PLAIN, f"{BLOCK}.qkv_proj": (40, 16, 2)}],
    "heads in turn": [PLAIN, {f"{BLOCK}.query_key_value": (40, 16, 2)}],
    "experts": [{f"model.layers.0.mlp.experts.{e}.{w}": (12, 16, 2) for e in range(2) for w in ("w1", "w3")}],
    "experts spelled twice": [
        {f"model.layers.0.mlp.experts.0.{w}": (12, 16, 2) for w in names}
        for names in (("w1", "w3"), ("gate_proj", "up_proj"))
    ],
}
ORDERS = {"in turn": lambda i, kinds: i % kinds, "one after another": lambda i, kinds: min(i // 3, kinds - 1)}
EACH = 6


def written(folder: Path, recipes: Sequence[Shapes], order: Callable[[int, int], int]) -> list[Path]:
    paths = []
    for i in range(EACH):
        shapes = recipes[order(i, len(recipes))]
        factors = {m: (gaussian(n, r, seed=i), gaussian(r, k, seed=i + 1)) for m, (n, k, r) in shapes.items()}
        paths.append(Adapter.from_tensors(factors, name=f"a{i}").save(folder / f"a{i}"))
    return paths


def looked_at(adapter: object) -> Adapter:
    assert isinstance(adapter, Adapter)
    return replace(adapter)


def described(make: Callable[[], Pool]) -> object:
    try:
        pool = make()
    except FastloraError as error:
        return type(error), str(error)
    updates = [(a.name, list(a.updates), [u.shape for u in a.updates.values()]) for a in pool.adapters]
    return pool.notices, [(m, pool.present(m)) for m in pool.modules], updates


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", POOLS)
def test_as_if_all_were_looked_at(kind: str, order: str, tmp_path: Path) -> None:
    paths = written(tmp_path, POOLS[kind], ORDERS[order])
    for _ in range(2):  # the second time all recipes are known
        alike = [load(path) for path in paths]
    # Of recipes whose configurations are the same, the last one is known.
    assert kind == "other shapes" or not any("updates" in vars(adapter) for adapter in alike)
    assert described(lambda: Pool(alike)) == described(lambda: Pool(looked_at(load(p)) for p in paths))
    renamed = {BLOCK: "block"}
    expected = described(lambda: Pool((looked_at(load(p)) for p in paths), rename=renamed))
    assert described(lambda: Pool([load(p) for p in paths], rename=renamed)) == expected
    for adapter, path in zip(alike, paths, strict=True):
        own = looked_at(load(path)).updates
        assert isinstance(adapter, Adapter) and all(
            torch.equal(u.B.stored, own[m].B.stored)  # type: ignore[arg-type]
            for m, u in adapter.updates.items()
        )


def test_nobody_looks_at_the_rest(tmp_path: Path) -> None:
    paths = written(tmp_path, [PLAIN], ORDERS["in turn"])
    load(paths[0])
    pool = Pool.load(paths)
    # Two for their names and forms, one more for the shapes of those that nobody has looked at.
    assert ["updates" in vars(adapter) for adapter in pool.adapters] == [True, True, True, *[False] * (EACH - 3)]
    assert pool.modules == list(PLAIN) and pool.present(f"{BLOCK}.q_proj") == list(range(EACH))


def test_two_of_one_name(tmp_path: Path) -> None:
    first, second = written(tmp_path, [PLAIN], ORDERS["in turn"])[:2]
    found = [described(lambda: Pool([load(first, "a"), load(second, "A")])) for _ in range(2)]
    said = "two adapters are called 'A' (Adapter('a', 2 modules, rank 2, float32) and Adapter('A', 2 modules"
    assert found[0] == found[1] and said in str(found[0])
