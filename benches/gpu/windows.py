"""The two windows as data: their stages, in order, with seconds of their own.

A stage may take what is its own and what stages before it left of theirs, but no more than ``most``. So the limits of
a window's stages, added, are what it takes at the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benches.gpu import building, facts, failures, measuring, profiling, testing

if TYPE_CHECKING:
    from benches.gpu.running import Visit

Run = Callable[["Visit", float], str]

WHOLE = 900  # seconds of a device for both windows, the start of the machine counted
START = 75  # seconds that starting and closing a machine takes


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of a window.

    ``run`` returns what there is to say of it. ``code``: the exit status where it is the first to fail. ``limit``:
    seconds of its own. ``most``: seconds with what is left over. ``least``: with fewer it is not begun. ``needs``:
    stages that must be done. ``lasts``: what it found is true of the device, so that it need not be found again when
    a window is resumed; a build is gone with its machine.
    """

    name: str
    run: Run
    code: int
    limit: float
    most: float
    least: float = 0.0
    needs: tuple[str, ...] = ("build",)
    lasts: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """``seconds``: the limit of the command. ``margin``: seconds of it for starting and for the last words."""

    name: str
    seconds: float
    stages: tuple[Stage, ...]
    margin: float = 10.0

    @property
    def limit(self) -> float:
        """Seconds for the stages."""
        return self.seconds - self.margin


FACTS = Stage("facts", facts.run, 10, limit=10, most=15, needs=(), lasts=False)
BUILD = Stage("build", building.run, 11, limit=100, most=160, needs=("facts",), lasts=False)


def _stages(*stages: Stage) -> tuple[Stage, ...]:
    return (FACTS, BUILD, *stages)


WINDOWS = {
    window.name: window
    for window in (
        Window("first", 330, _stages(
            Stage("smoke", measuring.smoke, 15, limit=40, most=60),
            Stage("times", measuring.cases("limits", "decompose", "launches"), 14, limit=35, most=60),
            Stage("opponents", measuring.cases("plain", "eigh", "svd"), 16, limit=40, most=70),
            Stage("profiles", profiling.run, 17, limit=20, most=45, least=15),
            Stage("tests", testing.tests, 12, limit=45, most=100, least=20),
            Stage("failures", failures.run, 18, limit=25, most=45, lasts=False),
            Stage("sweeps", measuring.sweeps, 19, limit=0, most=70, least=20),
        )),
        Window("record", 400, _stages(
            Stage("smoke", measuring.smoke, 15, limit=30, most=45),
            Stage("benches", measuring.cases(
                "limits", "decompose", "launches", "plain", "eigh", "svd", "files"), 14, limit=100, most=150),
            Stage("tests", testing.tests, 12, limit=70, most=140, least=20),
            Stage("memcheck", testing.memcheck, 13, limit=30, most=75, least=20),
            Stage("racecheck", testing.racecheck, 13, limit=20, most=60, least=20),
            Stage("failures", failures.run, 18, limit=25, most=45, lasts=False),
        )),
    )
}  # fmt: skip
