"""Right values of reported sums, removals and threads that went wrong in the arithmetic of parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian, make_config, peft_tensors, write_peft
from tolerances import FLOAT32, SUMS32
from typer.testing import CliRunner

import fastlora as fl
from fastlora.cli.app import app

MODULE = "model.layers.0.self_attn.q_proj"
SECOND = "model.layers.1.self_attn.q_proj"
N, M, RANK = 48, 40, 4


def factors(seed: int, rank: int = RANK, near: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``near``: the seed of two columns that others nearly have."""
    B = gaussian(N, rank, seed=seed)
    if near is not None:
        B = torch.cat([gaussian(N, 2, seed=near) + 0.05 * B[:, :2], B[:, 2:]], 1)
    return B, gaussian(rank, M, seed=seed + 1)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, fl.Adapter]:
    """``a`` and ``b`` have two directions in common; ``p`` and ``q`` have none."""
    made = {}
    for i, name in enumerate("abpq"):
        tensors = peft_tensors({MODULE: factors(10 * (i + 1), near=99 if name in "ab" else None)})
        made[name] = fl.load(write_peft(tmp_path / name, tensors, make_config(r=RANK, lora_alpha=RANK)))
    return made


def delta(adapter: fl.Adapter) -> torch.Tensor:
    return adapter.delta(MODULE).double()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = FLOAT32) -> None:
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def test_nothing_is_taken_out_of_a_sum_by_what_is_empty(adapters: dict[str, fl.Adapter], tmp_path: Path) -> None:
    total = delta(adapters["a"]) + delta(adapters["b"])
    expression = "unique(a + b | shared(p, q))"
    close(delta(fl.compose(expression, adapters)), total)
    given = [f"{name}={tmp_path / name}" for name in adapters]
    assert CliRunner().invoke(app, ["compose", expression, *given, "--out", str(tmp_path / "mix")]).exit_code == 0
    close(delta(fl.load(tmp_path / "mix")), total)


READERS: dict[str, Callable[[fl.Pool], torch.Tensor]] = {
    "unique": lambda pool: delta(fl.decompose(pool).unique_of("mixed")),
    "unique on the right": lambda pool: delta(fl.decompose(pool, side="right").unique_of("mixed")),
    "merge of a PoolGram": lambda pool: delta(fl.PoolGram(pool).merge(rank=8)),
    "slerp to nothing": lambda pool: delta(fl.merge(pool, method="slerp", t=0.0)),
    "components half the way to nothing": lambda pool: (
        2 * delta(fl.modulate(pool["mixed"], fl.dipm.interpolate(pool["empty"], 0.5), granularity="component"))
    ),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_sum_beside_nothing_is_the_sum(
    reader: Callable[[fl.Pool], torch.Tensor], adapters: dict[str, fl.Adapter], tmp_path: Path
) -> None:
    empty = replace(fl.decompose(fl.Pool([adapters["p"], adapters["q"]])).shared, name="empty")
    mixed = replace(adapters["a"] + adapters["b"], name="mixed")
    pool = fl.Pool([mixed, empty])
    close(reader(pool), delta(mixed))
    saved = fl.Pool([fl.load(mixed.save(tmp_path / "mixed")), empty])
    close(reader(saved), reader(pool))


def test_what_is_empty_has_no_norm_no_weight_and_no_direction(adapters: dict[str, fl.Adapter]) -> None:
    empty = replace(fl.decompose(fl.Pool([adapters["p"], adapters["q"]])).shared, name="empty")
    mixed = replace(adapters["a"] + adapters["b"], name="mixed")
    pool = fl.Pool([mixed, empty])
    norms = fl.PoolGram(pool).norms()
    assert norms["empty"] == 0.0 and norms["mixed"] == pytest.approx(float(delta(mixed).norm()), rel=FLOAT32)
    assert fl.weights(pool, "equal_energy") == {"mixed": 1.0, "empty": 0.0}
    assert fl.overlap(pool).cosine[0, 1].isnan()
    assert float(fl.decompose(pool).spectrum[MODULE].abs().sum()) == 0.0


@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
def test_nothing_is_left_of_a_direction_in_the_span_that_is_removed(granularity: str) -> None:
    own, other, third = (
        pools.make_adapter(name, {MODULE: (*factors(seed, rank), 1.0)})
        for name, seed, rank in (("own", 10, 4), ("other", 20, 4), ("third", 30, 3))
    )
    remove, interpolate = fl.dipm.remove, fl.dipm.interpolate
    for operators in (
        [remove([own, other, third])],
        [remove([third, own])],
        [remove([own, own])],
        [interpolate(other, 1.0), remove([other, third])],
        [fl.dipm.scale(0.3), remove([other, own])],
        [fl.dipm.reverse(), remove([other, own, third])],
        [fl.dipm.shift(own, other, 1.0), remove([other, third])],
        [fl.dipm.shift(own, other, 1e3), fl.dipm.shift(other, own, 1.0), remove([own, other])],
    ):
        gone = fl.modulate(own, operators, granularity=granularity)
        assert float(delta(gone).norm()) == 0.0, operators
        places = {"column": M, "component": 4, "matrix": 1}[granularity]
        counted = [int(note.split()[0]) for note in gone.notes if "nothing is left of them" in note]
        assert sum(counted) == places, (operators, gone.notes)


@pytest.mark.parametrize("on", ["B", "A"])
@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
def test_nothing_is_left_on_one_side(granularity: str, on: str) -> None:
    own, other, third = (
        pools.make_adapter(name, {MODULE: (*factors(seed), 1.0)})
        for name, seed in (("own", 10), ("other", 20), ("third", 30))
    )
    gone = fl.modulate(own, fl.dipm.remove([other, own, third]), granularity=granularity, on=on)
    assert float(delta(gone).norm()) <= SUMS32 * float(delta(own).norm())


@pytest.mark.parametrize("strength", [1.0, 0.3, 3.0, 0.7])
@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
def test_a_shift_from_itself_to_nothing_leaves_nothing(granularity: str, strength: float) -> None:
    part = (*factors(10), 1.0)
    own = pools.make_adapter("own", {MODULE: part, SECOND: part})
    other = pools.make_adapter("other", {MODULE: (*factors(20), 1.0)})
    found = fl.modulate(own, [fl.dipm.scale(strength), fl.dipm.shift(own, other)], granularity=granularity)
    assert float(found.delta(SECOND).norm()) == 0.0
    assert any("the shift cancels" in note for note in found.notes)


def test_a_pool_gram_serves_many_threads() -> None:
    pool = fl.Pool(
        pools.make_adapter(name, {MODULE: (*factors(seed), 1.0)}) for name, seed in zip("abc", (1, 5, 9), strict=True)
    )
    gram = fl.PoolGram(pool)
    points = [{"a": 1.0, "b": 0.1 * i, "c": -0.5} for i in range(3)]
    wanted = [delta(gram.merge(p, rank=4)) for p in points]
    problems: list[object] = []

    def work(i: int) -> None:
        for _ in range(40):
            try:
                if not torch.equal(delta(gram.merge(points[i], rank=4)), wanted[i]):
                    problems.append(i)
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(points))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
