"""Each launch of a prepared decomposition alone: out of memory, as in a pass over a model, and out of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastlora import DecompositionPlan
from fastlora.bench.gpu.events import TAU, Sizes, captured, copy_bandwidth, device_seconds
from fastlora.bench.gpu.table import seconds
from fastlora.bench.timing import Action
from fastlora.bench.workloads import make_pool
from fastlora.core.factors import SIDES
from fastlora.core.updates import factor

Row = dict[str, Any]


def side_bytes(plan: DecompositionPlan) -> dict[str, tuple[int, int]]:
    """By side: bytes of the stored factors, and of the results."""
    updates = [u for adapter in plan.pool.adapters for u in adapter.updates.values()]
    factors = {side: [factor(u, side).stored for u in updates] for side in SIDES}
    stored = {side: sum(t.nbytes for t in own if t is not None) for side, own in factors.items()}
    unique = sum(t.nbytes for own in plan.unique_parts.values() for t in own.values())
    first, second = (sum(pair[i].nbytes for pair in plan.shared_parts.values()) for i in (0, 1))
    results = {"B": unique + first, "A": second} if plan.settings.side == "left" else {"A": unique + first, "B": second}
    return {side: (stored[side], results[side]) for side in SIDES}


def steps(plan: DecompositionPlan) -> Iterator[tuple[str, Action, int]]:
    """Every launch in order: its name, what starts it, and the bytes of its side that it must move (0: not known)."""
    bytes_of = side_bytes(plan)
    passes: dict[str, Any] = {"gram": plan.gram, "combine": plan.combine}
    for name, prepared in passes.items():
        if name == "combine":
            for i, part in enumerate(plan.parts):
                for step, launches in part.steps.items():
                    yield f"{step}, group {i}", launches.run, 0
        for launch in getattr(prepared, "launches", ()):  # of Triton's backend alone
            rows = launch.constants.get("ROWS")
            side = "" if rows is None else "A" if rows else "B"
            moved = 0
            if side and ("sums" in launch.kernel.__name__ or "results" in launch.kernel.__name__):
                stored, results = bytes_of[side]
                moved = stored + (results if name == "combine" else 0)
            shape = {k: v for k, v in launch.constants.items() if k in ("ONE_GROUP", "WIDE", "TALL", "VECTOR")}
            told = ", ".join(f"{k.lower()} {v}" for k, v in shape.items())
            yield f"{launch.kernel.__name__} {side} {told}".strip(), launch.run, moved


def launches(sizes: Sizes) -> Iterator[Row]:
    """Times every launch of the main workload; the floor is its side's factors, and results, once."""
    plan = DecompositionPlan(make_pool(sizes.workload).to("cuda"), TAU)
    plan.run()
    bandwidth = copy_bandwidth(sizes)
    for i, (name, run, moved) in enumerate(steps(plan)):
        graph = captured(run)
        cold, hot = (device_seconds(graph, sizes, cold=is_cold) for is_cold in (True, False))
        row: Row = {"key": f"launch {i}: {name}", "seconds": cold, "hot": hot}
        row["note"] = f"{seconds(hot)} out of the cache"
        if moved:
            row["floor"] = moved / bandwidth
            row["note"] += f"; {moved / cold / 1e12:.2f} TB/s if each byte of its side moves once"
        yield row
