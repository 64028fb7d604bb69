"""Runs a window: stage by stage under limits, written after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benches.gpu import prebuilt
from benches.gpu.clocks import Clocks
from benches.gpu.processes import Command, Failed, Running, Shell, Skipped
from benches.gpu.report import CUT, DONE, EARLIER, FAILED, SKIPPED, Report, StageRecord, earlier
from benches.gpu.windows import Stage, Window

KEPT = ("rows", "forms", "failures", "profile")  # lists of a report whose entries name their stage


@dataclass
class Visit:
    """One run of a window on a machine.

    ``folder``: of what is kept beside the report. ``temporary``: of logs until they are moved there. ``background``:
    what was started and is waited for later. ``again``: by stage, what shows its failure alone. ``has_built``: whether
    the kernels had to be compiled here.
    """

    report: Report
    shell: Shell
    folder: Path
    temporary: Path
    tiny: bool = False
    background: dict[str, Running] = field(default_factory=dict)
    again: dict[str, Command] = field(default_factory=dict)
    has_built: bool = False
    stage: str = ""

    @property
    def rows(self) -> Path:
        """Where processes append their measurements."""
        return self.folder / "rows.jsonl"


def run(
    window: Window, visit: Visit, *, resume: bool = False, slower: float = 1.0,
    now: Callable[[], float] = time.monotonic,
) -> int:  # fmt: skip
    """Runs the stages of a window; the exit status is that of the first that failed, or 0.

    ``resume``: stages that an earlier report of the same commit has as done are not run again. ``slower``: what limits
    are multiplied by, where there is no device.
    """
    report, code, good = visit.report, 0, set[str]()
    report.before = earlier(window.name, report.out) if resume else []
    due = now()
    ends = due + window.limit * slower
    clocks = Clocks(visit.shell, visit.folder)
    try:
        for stage in window.stages:
            start = now()
            due += stage.limit * slower
            record = StageRecord(stage.name, CUT)
            report.stages.append(record)
            report.write()
            visit.stage = stage.name
            clocks.begin()
            try:
                if stage.lasts and any(_take(stage.name, before, report) for before in report.before):
                    record.result = EARLIER
                else:
                    limit = min(min(due, ends) - start, stage.most * slower)
                    record.detail = _run(stage, visit, limit, good, slower)
                    record.result = DONE
                good.add(stage.name)
            except Skipped as reason:
                record.result, record.detail = SKIPPED, str(reason)
            except Exception as error:
                record.result, record.detail = FAILED, _sentence(error)
                if isinstance(error, Failed) and error.again is not None:
                    visit.again[stage.name] = error.again
                code = code or stage.code
            record.seconds, record.clocks = now() - start, clocks.end()
            if "kernels prepared" in report.facts:  # how many were compiled here although some were
                found = len(prebuilt.kernels()) - report.facts["kernels prepared"]
                report.facts["kernels compiled here"] = found
            report.write()
            print(f"== {stage.name}: {record.result} {record.detail}", flush=True)
        report.before = []
        report.write()
    finally:
        clocks.stop()
        for running in visit.background.values():
            running.stop()
    return code


def _run(stage: Stage, visit: Visit, limit: float, good: set[str], slower: float) -> str:
    if not set(stage.needs) <= good:
        raise Skipped(f"needs {', '.join(stage.needs)}")
    if limit < max(stage.least * slower, 1e-3):
        raise Skipped(f"{max(limit, 0):.0f} s were left, it is not begun with less than {stage.least * slower:.0f} s")
    return stage.run(visit, limit)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"


def _take(stage: str, before: dict[str, object], report: Report) -> bool:
    """Takes what an earlier run of the window found in a stage, if it was of this commit and device and was done."""
    facts, stages = before["facts"], before["stages"]
    assert isinstance(facts, dict) and isinstance(stages, list)
    same = all(facts.get(name) == report.facts.get(name) for name in ("commit", "device"))
    done = any(s["stage"] == stage and s["result"] in (DONE, EARLIER) for s in stages)
    if not (same and done) or facts.get("commit") == "not known":
        return False
    for name in KEPT:
        found = before.get(name, [])
        assert isinstance(found, list)
        getattr(report, name).extend(entry for entry in found if entry.get("stage") == stage)
    return True
