"""Between host and device: pools that are larger than the device memory they may take, and results that go to the host.

Modules go through the device group by group. While one group is computed on the current stream, the next is copied on a
stream of its own: pinned memory, events between the two streams, no waiting of the host but for data. No result depends
on the groups. Results are computed into one buffer on the device, which is copied at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import Factor, Side
from fastlora.core.updates import Update, distinct, replaced, tensors
from fastlora.engine import buffers
from fastlora.engine.combine_jobs import WantedFactor, combine_job, stored_as
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob, CombineOutput, WriteProblem
from fastlora.runtime import devices

AdapterKey = TypeVar("AdapterKey")
CPU = torch.device("cpu")
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
    """Some modules of some adapters, such as those of a pool that are on the device."""

    names: list[str]
    adapters: list[LoraData]
    modules: list[str]

    def present(self, module: str) -> list[int]:
        """Which of the adapters have a module, by index."""
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
    """The stream in use, or ``None``."""
    return _current.get()


def needed(adapters: Sequence[LoraData], device: torch.device, bound: int | None) -> Stream | None:
    """The stream for adapters that do not fit into the bound together with their results; else ``None``, as for those
    that are on the device already."""
    if bound is None or device.type == "cpu" or all(a.place in (None, device) for a in adapters):
        return None
    size = sum(t.nbytes for a in adapters for u in a.updates.values() for t in tensors(u))
    return Stream(device, bound) if SHARE * size > bound else None


def parts(names: list[str], adapters: Sequence[LoraData], modules: Sequence[Sequence[str]]) -> Iterator[PoolPart]:
    """The adapters with some modules after others, on the device of the stream in use."""
    stream = current()
    assert stream is not None
    groups = [[(a, m) for a in adapters for m in some if m in a.updates] for some in modules]
    wanted = [distinct([a.updates[m] for a, m in group]) for group in groups]
    for some, group, moved_tensors in zip(modules, groups, _ahead(wanted, stream.device), strict=True):
        updates: dict[str, dict[str, Any]] = {a.name: {} for a in adapters}
        for adapter, module in group:
            updates[adapter.name][module] = replaced(adapter.updates[module], moved_tensors)
        yield PoolPart(names, [LoraData(a.name, updates[a.name], dtype=a.dtype) for a in adapters], list(some))


def _ahead(groups: Sequence[dict[object, Tensor]], device: torch.device) -> Iterator[dict[object, Tensor]]:
    """Tensors on the device, group by group; the next group is copied while one is used."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    copying: Any = _copying(device) if on_gpu else None

    def copied(group: dict[object, Tensor]) -> tuple[dict[object, Tensor], Any]:
        with torch.cuda.stream(copying) if on_gpu else contextlib.nullcontext():
            with devices.memory_told("copying modules to the device"):
                copies = dict(zip(group, buffers.moved(list(group.values()), device), strict=True)) if group else {}
            return copies, copying.record_event() if on_gpu else None

    with ThreadPoolExecutor(1) as worker:
        # Context variables and modes of torch belong to a thread.
        following: Future[Any] | None = worker.submit(contextvars.copy_context().run, copied, groups[0])
        for i in range(len(groups)):
            assert following is not None
            copies, event = following.result()
            more = i + 1 < len(groups)
            following = worker.submit(contextvars.copy_context().run, copied, groups[i + 1]) if more else None
            if on_gpu:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(event)
                for tensor in copies.values():
                    tensor.record_stream(computing)  # its memory is not used anew before this stream is done with it
            yield copies


def combine(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    """A combine pass over matrices of the host, computed on the device of the stream in use: one copy there, one back.

    Threads that call it have streams of their own, so that one copies while the other computes.
    """
    stream = current()
    assert stream is not None
    with _own_stream(stream.device):
        results = iter(_computed(jobs, stream.device))
    return run_pass("combine_pass", [CombineJob([], [_saved(o, results) for o in j.outputs], j.rows) for j in jobs])


def on_host(
    adapters: Mapping[AdapterKey, LoraData], dtypes: Mapping[AdapterKey, torch.dtype]
) -> Mapping[AdapterKey, LoraData]:
    """The adapters as they are saved, in host memory: factors in ``dtypes``, scaling inside ``B``.

    Adapters on the host are returned as they are. Those of a device are computed there in one pass, so that a matrix
    that several share is read once, and copied together. What was stored stays: matrices that are saved as they were
    loaded are not copied where the host still has them.
    """
    fetched = dict(adapters)
    for device in dict.fromkeys(a.device for a in adapters.values() if a.device.type != "cpu"):
        there = {key: a for key, a in adapters.items() if a.device == device}
        baked = {(key, m): u.baked() for key, a in there.items() for m, u in a.updates.items()}
        here = _updates_on_host(baked, dtypes, device)
        fetched |= {key: replace(a, updates={m: here[key, m] for m in a.updates}) for key, a in there.items()}
    return fetched


def _updates_on_host(
    updates: Mapping[tuple[AdapterKey, str], Update], dtypes: Mapping[AdapterKey, torch.dtype], device: torch.device
) -> dict[tuple[AdapterKey, str], Update]:
    """Updates of a device on the host, by adapter and module."""
    wanted: dict[tuple[str, Side], list[WantedFactor]] = {}
    stored: dict[object, Tensor] = {}
    for (key, module), update in updates.items():
        for factor in (update.B, update.A):
            matrix = stored_as(factor, dtypes[key])
            if matrix is not None:
                stored[id(matrix)] = matrix
            elif factor.rank and factor.terms:
                wanted.setdefault((module, factor.side), []).append(WantedFactor(factor, dtypes[key]))
    jobs = [combine_job(factors) for factors in wanted.values()]
    computed = [w.factor for factors in wanted.values() for w in factors]
    here: dict[object, Tensor] = buffers.moved_once(stored, CPU)
    here |= zip(map(id, computed), _computed(jobs, device), strict=True)

    def factor_here(factor: Factor) -> Factor:
        if not (factor.rank and factor.terms):
            return replace(factor, terms=())
        matrix = here.get(id(factor))
        return Factor.of(factor.side, here[id(factor.stored)] if matrix is None else matrix)

    return {place: replace(u, B=factor_here(u.B), A=factor_here(u.A)) for place, u in updates.items()}


def _computed(jobs: Sequence[CombineJob], device: torch.device) -> list[Tensor]:
    """The results of a combine pass, job by job, but for outputs without terms: in host memory, computed on a device
    into one buffer and copied at once."""
    layout = [(o.shape, o.dtype) for job in jobs for o in job.outputs if o.terms]
    starts, size = buffers.offsets(layout)
    with devices.memory_told("computing results"):
        there = _on_device(jobs, device)
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        results = iter(buffers.views(buffer, starts, layout))
        run_pass("combine_pass", [_into(job, there, results) for job in jobs if any(o.terms for o in job.outputs)])
        here = buffers.staging(size)
        here.copy_(buffer)
    return buffers.views(here, starts, layout)


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
    """The factors and coefficients of what is computed, by identity; what is on the device already stays."""
    wanted: dict[int, Tensor] = {}
    for job in jobs:
        for output in job.outputs:
            for factor, coefficient, _, _ in output.terms:
                wanted[id(job.factors[factor])] = job.factors[factor]
                if coefficient is not None:
                    wanted[id(coefficient)] = coefficient
    missing = {key: tensor for key, tensor in wanted.items() if tensor.device != device}
    return wanted | (dict(zip(missing, buffers.moved(list(missing.values()), device), strict=True)) if missing else {})


def _into(job: CombineJob, there: dict[int, Tensor], results: Iterator[Tensor]) -> CombineJob:
    """The job on the device, its results in memory there."""
    used = sorted({factor for o in job.outputs for factor, *_ in o.terms})
    index_of = {factor: i for i, factor in enumerate(used)}
    outputs = [
        CombineOutput.into(
            next(results),
            [(index_of[f], None if c is None else there[id(c)], at, scale) for f, c, at, scale in o.terms],
        )
        for o in job.outputs
        if o.terms
    ]
    return CombineJob([there[id(job.factors[f])] for f in used], outputs, job.rows)


def _saved(output: CombineOutput, results: Iterator[Tensor]) -> CombineOutput:
    """What is left to do on the host: to write a matrix."""
    if not output.terms:
        return output
    return CombineOutput.copy(next(results), output.file, output.offset, output.check)
