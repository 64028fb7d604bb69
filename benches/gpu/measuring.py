"""Stages that try kernels and time them: processes append rows to a file, which is read whatever becomes of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benches.gpu.processes import Clock, Command, Failed, Running, Shell, Skipped, last_line
from fastlora.bench.gpu import rows as lines

if TYPE_CHECKING:
    from benches.gpu.running import Visit
    from benches.gpu.windows import Run

CASES = "fastlora.bench.gpu.cases"
SMOKE = "fastlora.bench.gpu.smoke"
LIVE = "tests/on_gpu/test_live_models_on_device.py"
NO_TESTS = 5  # how pytest ends where all of a file is skipped
Rows = list[dict[str, Any]]


def smoke(visit: Visit, limit: float) -> str:
    """Every form of every kernel in a process of its own, one launch at a time, against float64."""
    clock = Clock(limit)
    live = _start_live(visit)
    seconds = ("--seconds", f"{0.9 * limit:.0f}", "--limit", f"{0.5 * limit:.0f}")
    words = ("-m", SMOKE, *(["--tiny"] if visit.tiny else []))
    command = visit.shell.python_command(*words, "--out", str(visit.rows), *seconds)
    found, failure = _measured(visit, command, limit)
    found.append(_live(visit, live, clock.left))
    visit.report.forms += found
    wrong = [row for row in found if "failed" in row]
    if wrong:
        said = "; ".join(f"{row['form']}: {row['failed']}" for row in wrong)
        name = wrong[0]["form"]
        again = live.command if name == LIVE else visit.shell.python_command(*words, "--forms", name)
        raise Failed(f"{len(wrong)} of {len(found)} forms: {said}", again=again)
    if failure is not None:
        raise failure
    skipped = [f"{row['form']}: {row['skipped']}" for row in found if "skipped" in row]
    return "; ".join([f"{len(found) - len(skipped)} forms are right", *skipped])


def _start_live(visit: Visit) -> Running:
    """The tests of live models beside the forms: most of their time is that of imports."""
    shell = Shell(visit.temporary / "live.log", visit.shell.python)
    return shell.start(shell.python_command("-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", LIVE))


def _live(visit: Visit, running: Running, limit: float) -> dict[str, Any]:
    """A row about them, as about a form."""
    row: dict[str, Any] = {"form": LIVE, "stage": visit.stage}
    try:
        running.result(max(limit, 5.0))
        return row
    except Failed as failure:
        if running.process.returncode != NO_TESTS:
            return row | {"failed": str(failure)}
        reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.+)$", failure.output, re.MULTILINE)
        return row | {"skipped": "; ".join(dict.fromkeys(reasons)) or last_line(failure.output)}
    finally:
        running.move_to(visit.shell.log)


def cases(*names: str) -> Run:
    """A stage that times some cases."""

    def run(visit: Visit, limit: float) -> str:
        command = _command(visit, names, str(visit.rows), "--seconds", f"{0.95 * limit:.0f}")
        found, failure = _measured(visit, command, limit)
        visit.report.rows += found
        wrong = [row for row in found if "failed" in row]
        if wrong:
            said = "; ".join(f"{row['key']}: {row['failed']}" for row in wrong)
            named = [row["key"] for row in wrong if row["key"] in names]
            raise Failed(said, again=_command(visit, named[:1], "/dev/null") if named else None)
        if failure is not None:
            raise failure
        return f"{len(found)} rows"

    return run


def sweeps(visit: Visit, limit: float) -> str:
    """Other tiles, warps and stages: what to set the constants of kernels to."""
    if visit.has_built:
        raise Skipped("left out where the kernels had to be built")
    return cases("sweeps")(visit, limit)


def _command(visit: Visit, names: tuple[str, ...] | list[str], out: str, *options: str) -> Command:
    tiny = ["--tiny"] if visit.tiny else []
    return visit.shell.python_command(
        "-m", CASES, out, "--cases", *names, *tiny, *options, OMP_WAIT_POLICY="passive"
    )  # fmt: skip


def _measured(visit: Visit, command: Command, limit: float) -> tuple[Rows, Failed | None]:
    """The rows that a command appended, each with its stage, and how it failed if it did."""
    begin = visit.rows.stat().st_size if visit.rows.exists() else 0
    failure = None
    try:
        visit.shell.run(command, limit)
    except Failed as error:
        failure = error
    return [{**row, "stage": visit.stage} for row in lines.read(visit.rows, begin)], failure
