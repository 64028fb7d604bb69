"""What is computed together: every module once, with those like it, and no more than fits in memory."""

from __future__ import annotations

import itertools

import pools
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlora as fl
from fastlora.core.updates import default_rtol
from fastlora.engine import schedule
from fastlora.engine.schedule import Group, parts, rtol_or_default, split_to_fit, whole_groups
from fastlora.runtime import memory
from fastlora.runtime.memory import bounded


def pool_of_many(modules: int = 7) -> fl.Pool:
    """Three adapters: modules that all have, one that two have, one that one has, one whose ranks differ, and one in
    bfloat16."""
    plain, ragged = pools.cast(pools.planted(3), torch.float32), pools.cast(pools.ragged(3), torch.float32)
    parts_of: list[dict[str, pools.Part]] = [{f"m{j}": part for j in range(modules)} for part in plain]
    for i, part in enumerate(ragged):
        parts_of[i]["ragged"] = part
        parts_of[i]["half"] = pools.cast(plain, torch.bfloat16)[i]
    parts_of[0]["two"], parts_of[2]["two"], parts_of[1]["one"] = plain[0], plain[2], plain[1]
    return fl.Pool(pools.make_adapter(f"a{i}", p) for i, p in enumerate(parts_of))


def test_groups_hold_modules_of_one_kind() -> None:
    pool = pool_of_many(2)
    groups = {tuple(part.modules): part.group for part in whole_groups(pool)}
    assert set(groups) == {("m0", "m1", "half"), ("ragged",), ("two",), ("one",)}
    assert groups["two",].members == (0, 2) and groups["one",] == Group((1,), (6,))
    assert groups["ragged",].ranks == tuple(a.updates["ragged"].rank for a in pool.adapters)
    apart = {tuple(part.modules): part.group for part in whole_groups(pool, rtol_of=rtol_or_default(None), least=2)}
    assert set(apart) == {("m0", "m1"), ("half",), ("ragged",), ("two",)}
    assert apart["half",].rtol == torch.finfo(torch.bfloat16).eps and apart["m0", "m1"].rtol == 1e-6
    together = whole_groups(pool, rtol_of=rtol_or_default(1e-3), least=2)
    assert ["m0", "m1", "half"] in [part.modules for part in together]


@pytest.mark.parametrize("coarse", ["B", "A"])
def test_the_rounding_of_an_update_is_that_of_its_coarser_factor(coarse: str) -> None:
    half, single = torch.bfloat16, torch.float32
    B = torch.ones(5, 2, dtype=half if coarse == "B" else single)
    A = torch.ones(2, 4, dtype=half if coarse == "A" else single)
    update = pools.update(B, A, 1.0)
    assert rtol_or_default(None)(update) == default_rtol([update]) == torch.finfo(torch.bfloat16).eps
    assert rtol_or_default(0.5)(update) == 0.5


def test_a_group_without_rank_is_padded_to_one() -> None:
    assert Group((0, 1), (0, 0)).rank == 1 and Group((0, 1), (3, 2)).rank == 3


def test_a_part_has_the_updates_of_its_adapters() -> None:
    pool = pool_of_many(2)
    two = next(part for part in whole_groups(pool) if part.modules == ["two"])
    assert two.names == ("a0", "a2")
    assert two.updates() == [[pool["a0"].updates["two"], pool["a2"].updates["two"]]]


@pytest.mark.parametrize("room", [1, 30_000, 10**9])
def test_parts_have_every_module_once_and_fit(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of_many()
    monkeypatch.setattr(schedule, "PART_BYTES", room)
    monkeypatch.setattr(memory, "LEAST", room)
    with bounded(1):  # less than any process takes, so that LEAST counts
        found = list(parts(pool, "testing", matrices=2))
    assert sorted(m for part in found for m in part.modules) == sorted(pool.modules)
    for part in found:
        stored = sum(t.source.nbytes for row in part.updates() for u in row for f in (u.B, u.A) for t in f.terms)
        assert len(part.modules) == 1 or 2 * part.group.pair_bytes * len(part.modules) + stored <= room
    assert (len(found) == 4) == (room == 10**9) and (len(found) == len(pool.modules)) == (room == 1)


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_neighbours_that_fit(sizes: list[int], room: int) -> None:
    ranges = split_to_fit(sizes, room)
    assert list(itertools.chain(*ranges)) == list(range(len(sizes)))
    for piece in ranges:
        assert len(piece) == 1 or sum(sizes[i] for i in piece) <= room
    for piece, following in itertools.pairwise(ranges):  # as few ranges as neighbours allow
        assert sum(sizes[i] for i in piece) + sizes[following[0]] > room
