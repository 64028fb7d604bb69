"""Times on a CUDA device: between two events, inputs out of memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from fastlora.bench.gpu.targets import MAIN
from fastlora.bench.timing import Action
from fastlora.bench.workloads import Workload
from fastlora.bench.workloads import find as find_workload

TAU = 0.85
PATIENCE = 1.0  # seconds of rounds of one run: fewer where it is slow
HEAD_START = 2_000_000  # cycles, a millisecond


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is measured."""

    workload: Workload
    checked: int  # modules of the workload whose results are compared with those of the CPU
    batch: int  # matrices
    copied: int  # bytes
    flush: int  # bytes written between rounds, and as many read: several times the L2 cache
    rounds: int


FULL = Sizes(find_workload(MAIN), checked=7, batch=1792, copied=2**30, flush=2**28, rounds=21)
# Short modules, and one long enough for tensor cores.
SMALL = Workload({"a": (37, 29), "b": (64, 48), "c": (1100, 1040)}, 3, 8, torch.bfloat16)
TINY = Sizes(SMALL, checked=2, batch=4, copied=2**16, flush=2**16, rounds=1)


class Flush:
    """Takes what a run reads out of the L2 cache. ``write`` leaves lines there that are still to be written to memory,
    which a run would wait for; reading as many others writes them."""

    def __init__(self, size: int) -> None:
        self._written = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._read = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.empty((), dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)


def device_seconds(run: Action, sizes: Sizes, head_start: int = HEAD_START, *, cold: bool = True) -> float:
    """Median seconds on the device between two events around a run, the L2 cache cleared before each if ``cold``.

    The device waits for ``head_start`` cycles before the first event, so that what the host takes to launch the run is
    not counted where it is less and the run does not wait for the device.
    """
    flush = Flush(sizes.flush) if cold else run
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    rounds = int(PATIENCE / once)
    if not rounds:  # beside more than a second, starting it is nothing; a third run is more than it is worth
        return once
    seconds = []
    for _ in range(min(rounds, sizes.rounds)):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush()
        torch.cuda._sleep(head_start)  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(float(before.elapsed_time(after)) / 1e3)
    return statistics.median(seconds)


def captured(run: Action) -> Action:
    """A run as a CUDA graph: what the device takes, without what the host takes to launch it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.ones(sizes.copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), sizes)
