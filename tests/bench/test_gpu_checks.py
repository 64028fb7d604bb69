"""What is checked of a plan before it is timed and after: every number, in the dtype that is timed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora as fl
from fastlora.bench.gpu import cases
from fastlora.bench.gpu.checks import require_plan
from fastlora.bench.workloads import Workload, make_pool

MODULES = {"a": (37, 29), "b": (64, 48), "c": (64, 48), "d": (1100, 1040)}


def ran(dtype: torch.dtype, side: str = "left", chain: str = "product") -> fl.DecompositionPlan:
    plan = fl.DecompositionPlan(make_pool(Workload(MODULES, 3, 5, dtype)), 0.3, side=side, chain=chain)
    plan.run()
    return plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("side", "chain"), [("left", "product"), ("right", "mean")])
def test_a_plan_of_the_cpu_is_right(dtype: torch.dtype, side: str, chain: str) -> None:
    require_plan(ran(dtype, side, chain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("module", ["a", "d"])
@pytest.mark.parametrize("what", ["unique", "Z", "mixed"])
def test_one_number_that_is_off_by_two_places_is_found(what: str, module: str, dtype: torch.dtype) -> None:
    plan = ran(dtype)
    result = plan.unique_parts["adapter1"][module] if what == "unique" else plan.shared_parts[module][what == "mixed"]
    place = divmod(int(result.abs().argmax()), result.shape[1])
    result[place] *= 1 + 2 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=f"{module}, result .* 1 numbers are off"):
        require_plan(plan)


def test_numbers_that_were_not_written_are_found() -> None:
    plan = ran(torch.bfloat16)
    plan.shared_parts["b"][0][3, 1] = torch.nan  # neither the first module nor the last
    with pytest.raises(AssertionError, match="NaN or Inf"):
        require_plan(plan)
    plan.run()
    plan.parts[0].blocks.projected[0, 0, 1] *= 1 + 2**-20
    with pytest.raises(AssertionError, match="block B 0 1"):
        require_plan(plan)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Runs cases that are given as functions; returns the exit status and the rows."""

    def run(seconds: float = 1200.0, **own: Any) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(cases, "CASES", own)
        out = tmp_path / "rows"
        monkeypatch.setattr(sys, "argv", ["cases", str(out), "--seconds", str(seconds)])
        return cases.main(), [json.loads(line) for line in out.read_text().splitlines()]

    yield run


def test_a_case_that_ends_its_process_ends_no_other(told: Any) -> None:
    def dies(sizes: cases.Sizes) -> Iterator[dict[str, Any]]:
        yield {"key": "before", "seconds": 1.0}
        os.kill(os.getpid(), signal.SIGKILL)

    def wrong(sizes: cases.Sizes) -> Iterator[dict[str, Any]]:
        yield {"key": "first", "seconds": 2.0}
        raise AssertionError("far off\nby far")

    def never(sizes: cases.Sizes) -> Iterator[dict[str, Any]]:
        while True:
            yield from ()

    def good(sizes: cases.Sizes) -> Iterator[dict[str, Any]]:
        yield {"key": "after", "seconds": 3.0}

    status, rows = told(dies=dies, wrong=wrong, good=good)
    assert status == 2
    assert [(r["key"], r.get("failed", "")) for r in rows] == [
        ("before", ""), ("dies", "ended by SIGKILL"), ("first", ""), ("wrong", "AssertionError: by far"), ("after", ""),
    ]  # fmt: skip
    status, rows = told(6.0, never=never, good=good)
    assert status == 1
    assert [r["key"] for r in rows[-2:]] == ["never", "after"]
    assert rows[-2]["failed"].startswith("stopped after ") and "failed" not in rows[-1]
