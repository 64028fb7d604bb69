"""A contest: one task, fastlora and its opponents, an answer that is checked before anything is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.bench.timing import Action, Contender, Machine, Times, alternate
from fastlora.errors import InputError

OURS = "fastlora"


class Unavailable(InputError):
    """A contest that cannot be held here, such as one against a package that is not installed."""


@dataclass(frozen=True, slots=True)
class Task:
    """The contenders by name, :data:`OURS` among them, and what the task must at least cost.

    ``moved``: bytes read and written. ``operations``: how many of each dtype. ``note``: what a reader of the times must
    know, such as parts that were timed once and counted several times. ``close`` is called at the end.
    """

    contenders: Mapping[str, Contender]
    moved: float = 0
    operations: Mapping[torch.dtype, float] = field(default_factory=dict)
    note: str = ""
    close: Action | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """``prepare`` makes the inputs; it raises ``AssertionError`` when an answer is wrong and :class:`Unavailable` when
    there is nothing to compare with."""

    what: str
    opponents: tuple[str, ...]
    prepare: Callable[[], Task]


@dataclass(frozen=True, slots=True)
class ContestRow:
    """One line of the table: median seconds of fastlora by threads, of one opponent at its best, and floors by
    threads."""

    what: str
    ours: dict[int, float]
    opponent: str
    theirs: float
    floor: dict[int, float] | None
    note: str = ""


def measure(contest: Contest) -> tuple[Task, Times]:
    """Prepares a contest and times its contenders in turn."""
    task = contest.prepare()
    try:
        if set(task.contenders) != {OURS, *contest.opponents}:
            raise ValueError(f"{contest.what}: {', '.join(task.contenders)} came, {contest.opponents} were announced")
        return task, alternate(task.contenders)
    finally:
        if task.close is not None:
            task.close()


def rows(contest: Contest, machine: Machine) -> list[ContestRow]:
    """The lines of a contest: one for every opponent."""
    task, times = measure(contest)
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    ours = {count: medians[OURS, count] for count in task.contenders[OURS].threads}
    floor = {count: machine.floor(task.moved, task.operations, count) for count in ours if count in machine.copy}
    lines = []
    for name in contest.opponents:
        count, theirs = best(name, medians)
        label = f"{name}, {count} thread{'s' * (count != 1)}"
        lines.append(ContestRow(contest.what, ours, label, theirs, floor if any(floor.values()) else None, task.note))
    return lines


def best(name: str, medians: Mapping[tuple[str, int], float]) -> tuple[int, float]:
    """The number of threads at which a contender is fastest, and its time there."""
    count = min((c for who, c in medians if who == name), key=lambda c: medians[name, c])
    return count, medians[name, count]


def require(what: str, got: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """Refuses to time a wrong answer. ``scale``: what the error is relative to; by default the largest value."""
    if scale is None:
        scale = float(expected.double().abs().max()) or 1.0
    error = float((got.double() - expected.double()).abs().max()) / scale
    if not error <= tolerance:
        raise AssertionError(f"{what}: error {error:.2e} above {tolerance:.0e}; a wrong answer is not timed")
