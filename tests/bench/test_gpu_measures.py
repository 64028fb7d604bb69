"""What is measured on a device beside the whole: plain torch, launches, other warps and stages, a profiler's counts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora as fl
from fastlora.bench.gpu import launches, plain, sweeps
from fastlora.bench.gpu.events import TAU
from fastlora.bench.workloads import Workload, make_pool

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benches.gpu import profiling  # noqa: E402

WORKLOAD = Workload({"q": (96, 64), "k": (96, 64), "up": (160, 64)}, 3, 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_torch_computes_the_same(dtype: torch.dtype) -> None:
    """As the opponent is held against ours on a device; in float32 to more digits."""
    pool = make_pool(Workload(WORKLOAD.modules, 3, 8, dtype))
    plan = fl.DecompositionPlan(pool, TAU)
    plan.run()
    stacks = plain.stacks(pool, "cpu")
    assert [own.modules for own in stacks] == [["q", "k"], ["up"]]
    for own in stacks:
        unique, Z, other = plain.decompose(own)
        plain.require_same(own, unique, plan)
        for g, module in enumerate(own.modules):
            shared = (Z[g].double() @ other[g].double()).float()
            wanted = plan.shared_parts[module][0].double() @ plan.shared_parts[module][1].double()
            tolerance = 1e-4 if dtype == torch.float32 else plain.ROUNDED
            assert float((shared - wanted).norm()) <= tolerance * float(wanted.norm())
    first = plan.unique_parts["adapter0"]["q"]
    first.add_(0.2 * first.abs().max())
    with pytest.raises(AssertionError, match="plain torch, adapter0 q"):
        plain.require_same(stacks[0], plain.decompose(stacks[0])[0], plan)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bytes_of_each_side(side: str) -> None:
    pool = make_pool(WORKLOAD)
    plan = fl.DecompositionPlan(pool, TAU, side=side)
    (whole,) = plan.halves
    found = launches.side_bytes(plan, whole)
    n, m = (sum(shape[i] for shape in WORKLOAD.modules.values()) for i in (0, 1))
    rank = 8 * 4  # bytes
    assert found["B"] == (3 * rank * n, rank * n * (4 if side == "left" else 1))
    assert found["A"] == (3 * rank * m, rank * m * (1 if side == "left" else 4))
    steps = [name for name, _, _ in launches.steps(plan)]
    assert steps[:2] == ["chain, group 0", "coefficients, group 0"]


@dataclass(frozen=True)
class Launch:
    warps: int
    stages: int
    constants: dict[str, Any] = field(default_factory=dict)


def test_variants_of_a_launch() -> None:
    """Each differs in one, and stages only where loads run ahead."""
    found = [(v.warps, v.stages) for v in sweeps.variants(Launch(4, 3))]
    assert found == [(2, 3), (8, 3), (4, 1), (4, 2), (4, 4), (4, 5)]
    assert list(sweeps.variants(Launch(1, 1))) == []
    ahead = [v.constants["AHEAD"] for v in sweeps.variants(Launch(1, 1, {"AHEAD": 3}))]
    assert ahead == [2, 4, 5]


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio".format
METRICS = ["gpu__time_duration.sum", "dram__bytes.sum", "launch__registers_per_thread"]
PROFILE = ["==PROF== Connected to process 1"] + [
    ",".join(f'"{cell}"' for cell in line)
    for line in (
        ["ID", "Kernel Name", *METRICS, STALLED("wait"), STALLED("barrier")],
        ["", "", "us", "Mbyte", "register/thread", "inst", "inst"],
        ["0", "half_sums(long, float *)", "101.25", "348.2", "165", "1.25", "3.50"],
        ["1", "write_blocks", "4.0", "", "72", "n/a", "0.5"],
        ["2", "cut"],
    )
]


def test_what_a_profiler_counted() -> None:
    assert profiling.table_of(PROFILE) == [
        {"kernel": "half_sums", "time": "101.25 us", "memory moved": "348.2 Mbyte", "registers": "165",
         "waits for": "barrier 3.5, wait 1.2"},
        {"kernel": "write_blocks", "time": "4.0 us", "registers": "72", "waits for": "barrier 0.5"},
    ]  # fmt: skip
    assert profiling.table_of(["==ERROR== ERR_NVGPUCTRPERM"]) == []
