"""Pools that are larger than the device memory they may take: modules go through it group by group.

While one group is computed on the current stream, the next is copied on a stream of its own: pinned memory, events
between the two streams, no waiting of the host but for data. No result depends on the groups.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.updates import distinct, replaced, tensors
from fastlora.engine import buffers
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob, CombineOutput, WriteProblem
from fastlora.runtime import devices

THREADS = 2  # that compute results: one copies while the other computes
SHARE = 4  # parts of the bound: a group that is computed, its results, the next group, and small matrices


class Stream(NamedTuple):
    """Where to compute, and the bytes that may be taken there."""

    device: torch.device
    bound: int

    @property
    def group(self) -> int:
        """Bytes of one group."""
        return max(1, self.bound // SHARE)


@dataclass(frozen=True, slots=True)
class PoolPart:
    """Some modules of a pool, on the device."""

    names: list[str]
    adapters: list[LoraData]
    modules: list[str]

    def present(self, module: str) -> list[int]:
        return [i for i, adapter in enumerate(self.adapters) if module in adapter]


_current: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("fastlora_stream", default=None)


@contextlib.contextmanager
def streamed(stream: Stream | None) -> Iterator[None]:
    """Inside the block, passes over factors on the host run on the device of the stream; ``None``: where they are."""
    token = _current.set(stream)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Stream | None:
    return _current.get()


def needed(adapters: Sequence[LoraData], device: torch.device, bound: int | None) -> Stream | None:
    """The stream for adapters that do not fit into the bound together with their results; else ``None``, as for those
    that are on the device already."""
    if bound is None or device.type == "cpu" or all(a.device == device for a in adapters):
        return None
    size = sum(t.nbytes for a in adapters for u in a.updates.values() for t in tensors(u))
    return Stream(device, bound) if SHARE * size > bound else None


def parts(names: list[str], adapters: Sequence[LoraData], modules: Sequence[Sequence[str]]) -> Iterator[PoolPart]:
    """The adapters with some modules after others, on the device of the stream in use."""
    stream = current()
    assert stream is not None
    groups = [[(a, m) for a in adapters for m in some if m in a.updates] for some in modules]
    wanted = [distinct([a.updates[m] for a, m in group]) for group in groups]
    for some, group, places in zip(modules, groups, _ahead(wanted, stream.device), strict=True):
        updates: dict[str, dict[str, Any]] = {a.name: {} for a in adapters}
        for adapter, module in group:
            updates[adapter.name][module] = replaced(adapter.updates[module], places)
        yield PoolPart(names, [LoraData(a.name, updates[a.name], dtype=a.dtype) for a in adapters], list(some))


def _ahead(groups: Sequence[dict[object, Tensor]], device: torch.device) -> Iterator[dict[object, Tensor]]:
    """Tensors on the device, group by group; the next group is copied while one is used."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    copying: Any = _copying(device) if on_gpu else None

    def copied(group: dict[object, Tensor]) -> tuple[dict[object, Tensor], Any]:
        with torch.cuda.stream(copying) if on_gpu else contextlib.nullcontext():
            with devices.memory_told("copying modules to the device"):
                found = dict(zip(group, buffers.moved(list(group.values()), device), strict=True)) if group else {}
            return found, copying.record_event() if on_gpu else None

    with ThreadPoolExecutor(1) as worker:
        # Context variables and modes of torch belong to a thread.
        following: Future[Any] | None = worker.submit(contextvars.copy_context().run, copied, groups[0])
        for i in range(len(groups)):
            assert following is not None
            found, event = following.result()
            more = i + 1 < len(groups)
            following = worker.submit(contextvars.copy_context().run, copied, groups[i + 1]) if more else None
            if on_gpu:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(event)
                for tensor in found.values():
                    tensor.record_stream(computing)  # its memory is not used anew before this stream is done with it
            yield found


def combine(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    """A combine pass over matrices of the host, computed on the device of the stream in use: one copy there, one back.

    Threads that call it have streams of their own, so that one copies while the other computes.
    """
    stream = current()
    assert stream is not None
    with _own_stream(stream.device), devices.memory_told("computing results"):
        there = _on_device(jobs, stream.device)
        computed = [(o.shape, o.dtype) for job in jobs for o in job.outputs if o.terms]
        starts, size = buffers.offsets(computed)
        buffer = torch.empty(size, dtype=torch.uint8, device=stream.device)
        results = iter(buffers.views(buffer, starts, computed))
        run_pass("combine_pass", [_into(job, there, results) for job in jobs if any(o.terms for o in job.outputs)])
        here = buffers.staging(size)
        here.copy_(buffer)
    found = iter(buffers.views(here, starts, computed))
    return run_pass("combine_pass", [CombineJob([], [_saved(o, found) for o in j.outputs], j.rows) for j in jobs])


# Few streams that are used again and again: torch keeps freed memory of every stream for itself.
@functools.cache
def _copying(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def _idle(device: torch.device) -> SimpleQueue[Any]:
    """The streams of threads that compute results, while they are not in use."""
    streams: SimpleQueue[Any] = SimpleQueue()
    for _ in range(THREADS):
        streams.put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return streams


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    stream = _idle(device).get()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _idle(device).put(stream)


def _on_device(jobs: Sequence[CombineJob], device: torch.device) -> dict[int, Tensor]:
    """The factors and coefficients of what is computed, by identity."""
    wanted: dict[int, Tensor] = {}
    for job in jobs:
        for output in job.outputs:
            for factor, coefficient, _, _ in output.terms:
                wanted[id(job.factors[factor])] = job.factors[factor]
                if coefficient is not None:
                    wanted[id(coefficient)] = coefficient
    return dict(zip(wanted, buffers.moved(list(wanted.values()), device), strict=True)) if wanted else {}


def _into(job: CombineJob, there: dict[int, Tensor], results: Iterator[Tensor]) -> CombineJob:
    """The job on the device, its results in memory there."""
    used = sorted({factor for o in job.outputs for factor, *_ in o.terms})
    place = {factor: i for i, factor in enumerate(used)}
    outputs = [
        CombineOutput.into(
            next(results),
            [(place[f], None if c is None else there[id(c)], at, scale) for f, c, at, scale in o.terms],
        )
        for o in job.outputs
        if o.terms
    ]
    return CombineJob([there[id(job.factors[f])] for f in used], outputs, job.rows)


def _saved(output: CombineOutput, found: Iterator[Tensor]) -> CombineOutput:
    """What is left to do on the host: to write a matrix."""
    if not output.terms:
        return output
    return CombineOutput.copy(next(found), output.file, output.offset, output.check)
