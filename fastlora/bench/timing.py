"""Medians of alternated runs, and what this machine could do at best."""

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
Run = Callable[[], object]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(runs: Mapping[str, tuple[int, Run]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each ``{name: (threads, run)}``: one run of each in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, (count, run) in runs.items():
            with threads(count):
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
            if round_number:  # the first round warms up
                times[name].append(elapsed)
    return {name: statistics.median(t) for name, t in times.items()}


@dataclass(frozen=True, slots=True)
class Machine:
    """Bandwidth of a large copy (bytes read and written per second) and rate of a matrix product (operations per
    second), by number of threads."""

    copy: dict[int, float]
    fp32: dict[int, float]
    fp64: dict[int, float]


def thread_counts() -> list[int]:
    return [1] if (os.cpu_count() or 1) == 1 else [1, 2]


def measure_machine() -> Machine:
    source = torch.ones(256 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    squares = {d: torch.ones(1024, 1024, dtype=d) for d in (torch.float32, torch.float64)}
    copy, rates = {}, {d: dict[int, float]() for d in squares}
    for count in thread_counts():
        copy[count] = 2 * source.nbytes / alternate({"copy": (count, lambda: target.copy_(source))})["copy"]
        for dtype, x in squares.items():
            rates[dtype][count] = 2 * 1024**3 / alternate({"mm": (count, lambda x=x: x @ x)})["mm"]  # type: ignore[misc]
    return Machine(copy, rates[torch.float32], rates[torch.float64])


def describe() -> str:
    """Processor, versions and how threads wait: a result without them means nothing."""
    import fastlora
    from fastlora.backends import cpu

    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    wait = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        f"{model}, {os.cpu_count()} cores; fastlora {fastlora.__version__} ({cpu.isa()}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, OMP_WAIT_POLICY {wait}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
