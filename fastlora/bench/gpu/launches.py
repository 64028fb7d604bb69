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
from fastlora.decomposition.planned_halves import PlannedHalf
from fastlora.ops.dispatch import Launches

Row = dict[str, Any]

SHOWN = ("ONE_GROUP", "WIDE", "TALL", "SIDE", "VECTOR")


def side_bytes(plan: DecompositionPlan, half: PlannedHalf) -> dict[str, tuple[int, int]]:
    """By side: bytes of the stored factors of a half's modules, and of their results."""
    modules = {module for part in half.parts for module in part.modules}
    updates = [u for adapter in plan.pool.adapters for module, u in adapter.updates.items() if module in modules]
    factors = {side: [factor(u, side).stored for u in updates] for side in SIDES}
    stored = {side: sum(t.nbytes for t in own if t is not None) for side, own in factors.items()}
    unique = sum(t.nbytes for own in plan.unique_parts.values() for m, t in own.items() if m in modules)
    shared = [pair for module, pair in plan.shared_parts.items() if module in modules]
    first, second = (sum(pair[i].nbytes for pair in shared) for i in (0, 1))
    results = {"B": unique + first, "A": second} if plan.settings.side == "left" else {"A": unique + first, "B": second}
    return {side: (stored[side], results[side]) for side in SIDES}


def steps(plan: DecompositionPlan) -> Iterator[tuple[str, Action, int]]:
    """Every launch of every half in turn: its name, what starts it, and the bytes of its side that it must move (0: not
    known)."""
    for half in plan.halves:
        bytes_of = side_bytes(plan, half)
        yield from _pass_steps("gram", half.gram, bytes_of)
        for part in half.parts:
            for step, prepared in part.steps.items():
                yield f"{step}, group {plan.parts.index(part)}", prepared.run, 0
        yield from _pass_steps("combine", half.combine, bytes_of)


def _pass_steps(
    name: str, prepared: Launches, bytes_of: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, Action, int]]:
    for launch in getattr(prepared, "launches", ()):  # of Triton's backend alone
        rows = launch.constants.get("ROWS")
        side = "" if rows is None else "A" if rows else "B"
        moved, kernel = 0, launch.kernel.__name__
        if side and kernel != "extreme_results":
            stored, results = bytes_of[side]
            moved = stored + (results if name == "combine" else 0)
        shape = {k: v for k, v in launch.constants.items() if k in SHOWN}
        told = ", ".join(f"{k.lower()} {v}" for k, v in shape.items())
        yield f"{kernel} {side} {told}".strip(), launch.run, moved


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
