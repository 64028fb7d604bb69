"""Pools: names, order, alignment of module names and what does not belong together."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, gaussian, make_adapter, make_config, write_peft

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import BaseInfo
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.errors import InputError

Q0, V0, Q1, UP1 = MODULES


def some(*modules: str) -> dict[str, tuple[int, int]]:
    return {m: MODULES[m] for m in modules}


def test_order_names_and_access(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / name, seed=i) for i, name in enumerate(("med", "legal", "code"))]
    pool = Pool.load(paths)
    assert pool.names == list(pool) == ["med", "legal", "code"] and len(pool) == 3
    assert pool["legal"] is pool.adapters[1] and "legal" in pool and "law" not in pool
    assert not pool.notices
    with pytest.raises(InputError, match="no adapter 'law'; it has med, legal, code"):
        pool["law"]
    named = Pool.load({"a": paths[2], "b": str(paths[0])})
    assert named.names == ["a", "b"] and named["a"].name == "a"
    assert Pool.load([named["a"], paths[1]]).names == ["a", "legal"]


def test_modules_are_a_union_in_order_of_appearance(tmp_path: Path) -> None:
    pool = Pool.load(
        [
            make_adapter(tmp_path / "a", some(V0, Q1)),
            make_adapter(tmp_path / "b", some(Q0, Q1), rank=2, dtype=torch.bfloat16),
            make_adapter(tmp_path / "c", some(UP1, V0), rank=3),
        ]
    )
    assert pool.modules == [V0, Q1, Q0, UP1]
    assert [pool.present(m) for m in pool.modules] == [[0, 2], [0, 1], [1], [2]]
    assert pool.present("elsewhere") == []
    assert not pool.notices


def test_no_adapters() -> None:
    with pytest.raises(InputError, match="none was given"):
        Pool([])
    with pytest.raises(InputError, match="not from the one path"):
        Pool.load("adapters/a")


def test_names_must_differ_and_be_folders(tmp_path: Path) -> None:
    one, two = make_adapter(tmp_path / "x" / "a"), make_adapter(tmp_path / "y" / "a")
    with pytest.raises(InputError, match=f"a={one} a-2={two}"):
        Pool.load([one, two])
    with pytest.raises(InputError, match="two adapters are called 'a'"):
        Pool([load(one), load(two)])
    with pytest.raises(InputError, match="starts with a dot"):
        Pool.load({"..": one})


@pytest.mark.parametrize("shape", [(24, 17), (25, 16)], ids=str)
def test_shapes_must_agree(tmp_path: Path, shape: tuple[int, int]) -> None:
    one = make_adapter(tmp_path / "one")
    two = make_adapter(tmp_path / "two", {**MODULES, Q1: shape})
    with pytest.raises(InputError, match=rf"{Q1}' is \[24, 16\] in adapter 'one' and \[.*\] in adapter 'two'"):
        Pool.load([one, two])


def test_layouts_must_agree(tmp_path: Path) -> None:
    prefix = "base_model.model.conv."
    one = {
        f"{prefix}lora_A.weight": gaussian(4, 6, 2, 3, seed=1),
        f"{prefix}lora_B.weight": gaussian(8, 4, 1, 1, seed=2),
    }
    two = {
        f"{prefix}lora_A.weight": gaussian(4, 6, 3, 2, seed=1),
        f"{prefix}lora_B.weight": gaussian(8, 4, 1, 1, seed=2),
    }
    paths = [write_peft(tmp_path / "one", one), write_peft(tmp_path / "two", two)]
    with pytest.raises(InputError, match=r"kernel \[2, 3\].*kernel \[3, 2\]"):
        Pool.load(paths)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"base_model_name_or_path": "other/model"}, "different base models .*made-up/model.*other/model"),
        ({"revision": "v2"}, None),
        ({"base_model_name_or_path": None}, None),
    ],
    ids=repr,
)
def test_differing_bases_are_noticed(tmp_path: Path, fields: dict[str, Any], words: str | None) -> None:
    pool = Pool.load([make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", **fields)])
    assert len(pool.notices) == (words is not None)
    if words is not None:
        assert re.search(words, pool.notices[0])


def test_differing_revisions_are_noticed(tmp_path: Path) -> None:
    pool = Pool.load([make_adapter(tmp_path / "a", revision="v1"), make_adapter(tmp_path / "b", revision="v2")])
    assert len(pool.notices) == 1 and "v1" in pool.notices[0] and "v2" in pool.notices[0]


def test_repeated_layers_must_agree(tmp_path: Path) -> None:
    one, two = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(InputError, match="layer_replication"):
        Pool.load([one, two])
    three = make_adapter(tmp_path / "c", layer_replication=[[0, 2], [1, 2]])
    assert len(Pool.load([two, three])) == 2


def renamed(add: str = "", strip: str = "", *modules: str) -> dict[str, tuple[int, int]]:
    return {add + m.removeprefix(strip): MODULES[m] for m in modules or MODULES}


@pytest.mark.parametrize(
    "first, second",
    [
        (renamed(), renamed("", "model.")),
        (renamed("", "model."), renamed()),
        (renamed(), renamed("base.language.")),
        (renamed(), renamed("", "model.", Q1, UP1)),
    ],
    ids=["missing", "added", "longer", "a part of the modules"],
)
def test_one_common_prefix_is_aligned(
    tmp_path: Path, first: dict[str, tuple[int, int]], second: dict[str, tuple[int, int]]
) -> None:
    paths = [make_adapter(tmp_path / "a", first), make_adapter(tmp_path / "b", second, seed=1)]
    pool = Pool.load(paths)
    assert pool.modules == load(paths[0]).modules
    assert len(pool.notices) == 1 and "'b' was saved from a differently wrapped model" in pool.notices[0]
    alone = load(paths[1])
    for ours, theirs in zip(sorted(pool["b"].modules), sorted(alone.modules), strict=True):
        got, expected = pool["b"].updates[ours].B.stored, alone.updates[theirs].B.stored
        assert got is not None and expected is not None and torch.equal(got, expected)


def test_alignment_renames_extras_and_containers(tmp_path: Path) -> None:
    def experts(where: str) -> Path:
        prefix = f"base_model.model.{where}layers.0.mlp.experts."
        tensors = {
            f"{prefix}lora_A.weight": gaussian(8, 6, seed=1),
            f"{prefix}lora_B.weight": gaussian(5, 8, seed=2),
            f"base_model.model.{where}head.weight": gaussian(2, 2, seed=3),
        }
        config = make_config(target_parameters=["mlp.experts.down_proj"], modules_to_save=["head"])
        return write_peft(tmp_path / f"a{where}", tensors, config)

    second = Pool.load([experts("model."), experts("")])["a"]
    assert second.modules == [f"model.layers.0.mlp.experts.down_proj[{e}]" for e in range(2)]
    assert {u.layout.container for u in second.updates.values()} == {"model.layers.0.mlp.experts.down_proj"}
    assert list(second.extras) == ["model.head.weight"]


def test_two_possible_prefixes_are_refused(tmp_path: Path) -> None:
    first = {f"{side}.layers.0.q": (8, 8) for side in ("encoder", "decoder")}
    paths = [make_adapter(tmp_path / "a", first), make_adapter(tmp_path / "b", {"layers.0.q": (8, 8)})]
    with pytest.raises(InputError, match=r"no module in common.*--map OLD=NEW"):
        Pool.load(paths)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    other = {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.0.mlp.c_fc": (64, 16)}
    paths = [make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", other)]
    with pytest.raises(InputError, match=r"'b' has no module in common with 'a'.*another base model.*c_attn.*q_proj"):
        Pool.load(paths)


def test_disjoint_modules_of_one_model_are_a_notice(tmp_path: Path) -> None:
    pool = Pool.load([make_adapter(tmp_path / "a", some(Q1)), make_adapter(tmp_path / "b", some(UP1))])
    assert pool.modules == [Q1, UP1]
    assert pool.notices == ["adapter 'b' shares no module with the adapters before it"]


def test_subset_keeps_module_names() -> None:
    """Two adapters of a pool may have no module in common; on their own they would look like different models."""
    pool = Pool([make_named("a", ["x", "y"]), make_named("b", ["x"]), make_named("c", ["y"])])
    pair = pool.subset(["b", "c"])
    assert pair.modules == ["x", "y"] and pair.notices == []


def test_a_subset_is_the_pool_of_its_adapters(tmp_path: Path) -> None:
    adapters = [make_named("a", ["x", "y"]), make_named("b", ["y", "z"]), make_named("c", ["z", "x"])]
    adapters = [replace(a, base=BaseInfo(model=f"org/{a.name}")) for a in adapters]
    whole = Pool(adapters, align=False)
    for names in ("ab", "ca", "bca", "b"):
        found, expected = whole.subset(names), Pool([whole[n] for n in names], align=False)
        assert (found.names, found.modules, found.notices) == (expected.names, expected.modules, expected.notices)
        assert [found.present(m) for m in "xyz"] == [expected.present(m) for m in "xyz"]
        assert all(found[n] is whole[n] for n in names)
    assert len(whole.notices) == 1 and whole.names == ["a", "b", "c"]
    for wrong, message in (("", "a pool needs adapters"), ("aba", "two adapters are called 'a'"), ("ad", "no adapter")):
        with pytest.raises(InputError, match=message):
            whole.subset(wrong)


def make_named(name: str, modules: list[str]) -> Adapter:
    factors = Factor.of("B", torch.ones(3, 1)), Factor.of("A", torch.ones(1, 2))
    return Adapter(name, {m: Update(*factors) for m in modules})
