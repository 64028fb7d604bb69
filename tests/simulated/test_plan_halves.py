"""A plan in two halves: what waits for what, which modules are in which, and the bits of the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from simulated import DEVICE
from test_plan import THRESHOLD, deltas, ragged_pool

import fastlora as fl
from fastlora.bench.workloads import Workload, make_pool
from fastlora.decomposition import plan as plans
from fastlora.decomposition.planned_halves import PlannedHalf, in_halves, run_beside
from fastlora.engine.schedule import whole_groups


@dataclass(eq=False)
class Stream:
    """A stream that knows what is done before its next work."""

    done: set[str] = field(default_factory=set)
    device: torch.device = DEVICE

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def record_event(self) -> set[str]:
        return set(self.done)

    def wait_event(self, event: set[str]) -> None:
        self.done |= event


class Streams:
    """torch's current stream, of a device that is none."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = self.main = Stream()
        self.before: dict[str, set[str]] = {}
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self.entered)

    @contextlib.contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer

    def work(self, name: str) -> Any:
        """Something to run, which notes what was done before it."""

        class Work:
            @staticmethod
            def run() -> None:
                self.before[name] = set(self.current.done)
                self.current.done.add(name)

        return Work()


def test_chains_run_beside_the_passes_over_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, side = Streams(monkeypatch), Stream()
    names = ("gram", "chain", "combine")
    halves = []
    for half in (1, 2):
        gram, chain, combine = (streams.work(f"{name} {half}") for name in names)
        halves.append(PlannedHalf(gram, [chain], combine))
    run_beside(halves[0], halves[1], side)  # type: ignore[arg-type]
    assert streams.before == {
        "gram 1": set(),
        "chain 1": {"gram 1"},
        "gram 2": {"gram 1"},
        "chain 2": {"gram 1", "gram 2", "chain 1"},
        "combine 1": {"gram 1", "gram 2", "chain 1"},
        "combine 2": {f"{name} {half}" for name in names for half in (1, 2)} - {"combine 2"},
    }
    assert streams.main.done == streams.before.keys() and streams.current is streams.main


def test_halves_have_about_the_same_bytes() -> None:
    """Every module once, in order; no half without modules; whole where passes are shorter than launches."""
    sizes = {f"m{i}": (64 * (1 + i % 3), 64) for i in range(7)}
    pool = make_pool(Workload(sizes | {"wide": (96, 32)}, 2, 4, torch.float32))
    groups = whole_groups(pool, least=2)
    first, second = in_halves(groups, 0)
    assert [m for part in (*first, *second) for m in part.modules] == list(pool.modules)
    bytes_of = [
        sum(sum(pool.adapters[0].updates[m].shape) for part in half for m in part.modules) for half in (first, second)
    ]
    assert max(bytes_of) < 1.3 * min(bytes_of)
    total = sum(t.nbytes for a in pool.adapters for u in a.updates.values() for t in (u.B.stored, u.A.stored))  # type: ignore[union-attr]
    assert in_halves(groups, total) != [groups] == in_halves(groups, total + 1)
    one = make_pool(Workload({"m": (64, 64)}, 2, 4, torch.float32))
    assert [len(half) for half in in_halves(whole_groups(one, least=2), 0)] == [1]
    assert in_halves([], 0) == [[]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_bits_as_in_one(side: str, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of several groups of modules, on a device: also after new data."""
    Streams(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream())

    def made(least: int) -> dict[str, dict[str, torch.Tensor]]:
        monkeypatch.setattr(plans, "WORTH", least)
        plan = fl.DecompositionPlan(ragged_pool(torch.bfloat16).to("cuda"), THRESHOLD, side=side)
        assert len(plan.halves) == (1 if least else 2)
        plan.run()
        plan.fill(ragged_pool(torch.bfloat16, seed=3).to("cuda"))
        plan.run()
        return {place: deltas(adapter.to("cpu")) for place, adapter in plan.adapters().items()}

    whole, halved = made(2**40), made(0)
    assert list(whole) == list(halved) and any(whole.values())
    for place, modules in whole.items():
        assert list(modules) == list(halved[place])
        assert all(torch.equal(delta, halved[place][module]) for module, delta in modules.items())
