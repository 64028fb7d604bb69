"""Other warps and stages of each Triton launch of a decomposition: which are faster, and whether bits stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora import DecompositionPlan
from fastlora.bench.gpu.events import TAU, Sizes, captured, device_seconds
from fastlora.bench.workloads import make_pool

Row = dict[str, Any]
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4, 5)
AHEAD = "AHEAD"  # the constant of kernels whose own loops have stages
ROUNDS = 7


def variants(launch: Any) -> Iterator[Any]:
    """A launch with other warps, and with other stages where it has a loop that loads ahead."""
    for warps in WARPS:
        if warps != launch.warps and launch.warps > 1:
            yield replace(launch, warps=warps)
    for stages in STAGES:
        if stages != launch.stages and launch.stages > 1:
            yield replace(launch, stages=stages)
        if stages > 1 and stages != launch.constants.get(AHEAD, stages):
            yield replace(launch, constants={**launch.constants, AHEAD: stages})


def sweeps(sizes: Sizes) -> Iterator[Row]:
    """Times every variant of every launch, out of memory; one that a multiprocessor has no room for is named."""
    sizes = replace(sizes, rounds=min(sizes.rounds, ROUNDS))
    plan = DecompositionPlan(make_pool(sizes.workload).to("cuda"), TAU)
    plan.run()
    half = plan.halves[0]  # the other has the same launches
    passes: tuple[Any, ...] = half.gram, half.combine  # of Triton's backend, which lists them
    for prepared in passes:
        for i, launch in enumerate(prepared.launches):
            before, own = _bits(plan), device_seconds(captured(launch.run), sizes)
            for variant in variants(launch):
                key = f"sweep {launch.kernel.__name__} {_sides(launch)}, {_settings(variant)}"
                try:
                    seconds = device_seconds(captured(variant.run), sizes)
                except Exception as error:
                    if "out of resource" not in str(error):
                        raise
                    yield {"key": key, "skipped": str(error).splitlines()[0]}
                    continue
                launches = (*prepared.launches[:i], variant, *prepared.launches[i + 1 :])
                replace(prepared, launches=launches).run()
                same = all(map(torch.equal, before, _bits(plan)))
                note = f"{own / seconds:.2f} × the speed of {_settings(launch)}"
                yield {"key": key, "seconds": seconds, "note": note + ("" if same else "; other bits")}
            prepared.run()


def _settings(launch: Any) -> str:
    return f"{launch.warps} warps, {launch.constants.get(AHEAD, launch.stages)} stages"


def _sides(launch: Any) -> str:
    rows = launch.constants.get("ROWS")
    return "" if rows is None else "A" if rows else "B"


def _bits(plan: DecompositionPlan) -> list[Tensor]:
    """Copies of what both passes write for the first part: its Gram blocks, and results of its first module."""
    part = plan.halves[0].parts[0]
    module = part.modules[0]
    unique = [plan.unique_parts[name][module] for name in part.names]
    written = (part.blocks.projected, part.blocks.other, *unique, *plan.shared_parts[module])
    return [t.clone() for t in written]
