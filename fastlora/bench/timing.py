"""Alternated runs, and what this machine could do at best."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROUNDS = 7
# A round repeats a run until this has passed, and counts the median: one run of a millisecond after another's work
# would measure how cold the processor's caches are and how long threads take to wake up.
ROUND_SECONDS = 0.05
Action = Callable[[], object]
Times = dict[tuple[str, int], list[float]]


class Seconds(float):
    """What a run returns that measured itself, such as a child process without its start: taken for its time."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is timed, at each of some numbers of threads.

    ``run`` may return :class:`Seconds` to be taken for what passed on the clock. ``reset`` runs before every run and
    is not timed; a round of a contender that has one is a single run. ``rounds``: how often it is timed; a contender
    that is timed once runs once, without a round to warm up.
    """

    run: Action
    threads: tuple[int, ...] = (1,)
    rounds: int = ROUNDS
    reset: Action | None = None


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch computes on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(contenders: Mapping[str, Contender]) -> Times:
    """Seconds of every round by ``(name, threads)``: one round of each in turn, so that all see the same machine."""
    times: Times = {(name, count): [] for name, c in contenders.items() for count in c.threads}
    for round_number in range(1 + max(c.rounds for c in contenders.values())):
        for (name, count), seconds in times.items():
            contender = contenders[name]
            warming = round_number == 0 and contender.rounds > 1
            if len(seconds) == contender.rounds:
                continue
            if contender.reset is not None:
                contender.reset()
            with threads(count):
                elapsed = _round(contender)
            if not warming:
                seconds.append(elapsed)
    return times


def _round(contender: Contender) -> float:
    """Median seconds of the runs of a round."""
    runs: list[float] = []
    passed = 0.0
    while not runs or (passed < ROUND_SECONDS and contender.reset is None and contender.rounds > 1):
        start = time.perf_counter()
        result = contender.run()
        elapsed = time.perf_counter() - start
        runs.append(float(result) if isinstance(result, Seconds) else elapsed)
        passed += elapsed
    return statistics.median(runs)


def median_of(run: Action, count: int) -> float:
    """Median seconds of a run alone."""
    return statistics.median(alternate({"": Contender(run, (count,))})["", count])


@dataclass(frozen=True, slots=True)
class Machine:
    """Bandwidth of a large copy (bytes read and written per second) and rate of a matrix product (operations per
    second), by number of threads."""

    copy: dict[int, float]
    fp32: dict[int, float]
    fp64: dict[int, float]

    def floor(self, moved: float, operations: Mapping[torch.dtype, float], threads: int) -> float:
        """Seconds that so many bytes take to be moved, or so many operations, of one dtype after the other, to be done,
        whichever takes longer."""
        rates = {torch.float64: self.fp64}
        computing = sum(count / rates.get(dtype, self.fp32)[threads] for dtype, count in operations.items())
        return max(moved / self.copy[threads], computing)


def thread_counts() -> tuple[int, ...]:
    """The numbers of threads that contenders are timed on."""
    return (1,) if (os.cpu_count() or 1) == 1 else (1, 2)


def measure_machine() -> Machine:
    """Times copies of 256 MiB and products of 1024×1024 matrices, which floors are computed from."""
    source = torch.ones(256 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    squares = {d: torch.ones(1024, 1024, dtype=d) for d in (torch.float32, torch.float64)}
    copy, rates = {}, {d: dict[int, float]() for d in squares}
    for count in thread_counts():
        copy[count] = 2 * source.nbytes / median_of(lambda: target.copy_(source), count)
        for dtype, x in squares.items():
            rates[dtype][count] = 2 * 1024**3 / median_of(lambda x=x: x @ x, count)  # type: ignore[misc]
    return Machine(copy, rates[torch.float32], rates[torch.float64])


def waiting() -> str | None:
    """What is wrong with how threads wait, or ``None``. OpenMP reads the variable when torch is imported."""
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":
        return None
    return (
        f"OMP_WAIT_POLICY is {policy or 'not set'}: threads that spin while they wait make two of them slower than one "
        "on small machines; set it to passive"
    )


def describe() -> str:
    """Processor, versions and how threads wait: a result without them means nothing."""
    import fastlora
    from fastlora.backends import cpu

    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    kernels = cpu.isa() if cpu.unavailable() is None else "plain torch"
    wait = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        f"{model}, {os.cpu_count()} cores; fastlora {fastlora.__version__} ({kernels}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, OMP_WAIT_POLICY {wait}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
