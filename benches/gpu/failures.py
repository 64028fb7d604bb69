"""What failed, once more and alone: launch by launch, then under memcheck."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benches.gpu.processes import Clock, Command, Failed, Skipped
from benches.gpu.report import SHOWN
from benches.gpu.testing import sanitizer

if TYPE_CHECKING:
    from benches.gpu.running import Visit


def run(visit: Visit, limit: float) -> str:
    """The smallest command of every stage that failed; the last lines of its output go into the report."""
    if not visit.again:
        raise Skipped("nothing failed")
    clock = Clock(limit)
    said = []
    ways = [(stage, command, how) for stage, command in visit.again.items() for how in ("launch by launch", "memcheck")]
    for i, (stage, command, how) in enumerate(ways):
        if clock.left < 3:
            said.append(f"{stage}, {how}: no time was left")
            continue
        try:
            alone = _changed(command, how)
        except Skipped as reason:
            said.append(f"{stage}, {how}: {reason}")
            continue
        share = clock.left / (len(ways) - i)
        try:
            output, ended = visit.shell.run(alone, share), "ended well"
        except Failed as failure:
            output, ended = failure.output, str(failure)
        last = "\n".join(output.splitlines()[-SHOWN:])
        visit.report.failures.append({"stage": stage, "how": how, "command": str(alone), "output": last})
        visit.report.write()
        said.append(f"{stage}, {how}: {ended}")
    return "; ".join(said)


def _changed(command: Command, how: str) -> Command:
    return sanitizer(command, "memcheck") if how == "memcheck" else command.under(CUDA_LAUNCH_BLOCKING="1")
