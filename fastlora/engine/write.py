"""Writing adapters: factors are computed where they are written from, a module at a time in every thread."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import SIDES, Factor, Side
from fastlora.core.updates import Update, sources, zero_factors
from fastlora.engine import stream
from fastlora.engine.contracts import OpenSink, Sink
from fastlora.engine.materialise import Sources, materialise_groups
from fastlora.engine.offload import on_host
from fastlora.ops import dispatch
from fastlora.ops.passes import CombineJob, CombineOutput
from fastlora.runtime.cpython import paused_collector, quick_handover
from fastlora.runtime.memory import batch_bytes, release
from fastlora.runtime.progress import track

WRITE_BYTES = 128 * 2**20
PREPARED = 2  # batches of modules that are ready while one is written
# Files that are written at once: a decomposition of many pairs has more of them than a process may hold open.
OPEN_FILES = 128


def write_adapters(
    adapters: Mapping[Path, LoraData],
    targets: Mapping[Path, torch.dtype],
    open_sink: OpenSink,
    meanwhile: Callable[[], object],
) -> None:
    """Writes adapters that share stored matrices into the sinks of their directories, in the ``targets``' dtypes; each
    stored matrix is read once.

    Modules of rank 0 are left out; an adapter with nothing in it is written as zeros of rank 1, which PEFT can load.
    Factors are computed where they are written from, a module at a time in every thread, so memory does not grow with
    the model; one thread prepares the next modules meanwhile. ``meanwhile`` is called while the last are written.
    """
    with paused_collector(), quick_handover():
        _write_adapters(on_host(adapters, targets), targets, open_sink, meanwhile)


def _write_adapters(
    adapters: Mapping[Path, LoraData],
    targets: Mapping[Path, torch.dtype],
    open_sink: OpenSink,
    meanwhile: Callable[[], object],
) -> None:
    empty = {
        d: zero_factors(a.name, a.updates, targets[d])
        for d, a in adapters.items()
        if not any(u.rank for u in a.updates.values())
    }
    files: dict[Path, Sink] = {}
    for directory, adapter in adapters.items():
        outlines = {m: _outline(u, targets[directory]) for m, u in adapter.updates.items() if u.rank} or empty[
            directory
        ]
        files[directory] = open_sink(directory, adapter, outlines, targets[directory])
    shares = [list(files.items())[i : i + OPEN_FILES] for i in range(0, len(files), OPEN_FILES)]
    # Of results that go through a device, one batch is computed while another is copied.
    with ThreadPoolExecutor(1 if stream.current() is None else stream.THREADS) as worker:
        pending: deque[Future[None]] = deque()
        for modules in track(_module_batches(list(adapters.values())), "writing"):
            for share in shares:
                prepared = _prepare(dict(share), adapters, modules, [d for d, _ in share if d not in empty])
                # The backend and the bound on memory are context variables, which new threads do not see.
                pending.append(worker.submit(contextvars.copy_context().run, prepared.write))
                if len(pending) > PREPARED:
                    pending.popleft().result()
        meanwhile()
        for directory, file in files.items():
            file.finish(empty.get(directory, {}))
        for last in pending:
            last.result()
    for file in files.values():
        file.close()


def _outline(update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of the right shape without memory."""
    n, m = update.shape
    return _meta(n, update.rank, dtype), _meta(update.rank, m, dtype)


@functools.lru_cache(maxsize=256)
def _meta(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _module_batches(adapters: Sequence[LoraData]) -> list[list[str]]:
    """Module names in batches that are prepared together; the experts of one parameter stay together."""
    sizes: dict[str, int] = {}
    units: dict[str, list[str]] = {}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            unit = update.layout.container or module
            names = units.setdefault(unit, [])
            if module not in names:
                names.append(module)
            sizes[unit] = sizes.get(unit, 0) + 4 * update.rank * sum(update.shape)
    batches: list[list[str]] = []
    room = 0
    for unit, names in units.items():
        if not batches or room < sizes[unit]:
            batches.append([])
            through = stream.current()
            room = batch_bytes(WRITE_BYTES if through is None else min(WRITE_BYTES, through.group))
        batches[-1] += names
        room -= sizes[unit]
    return batches


@dataclass(slots=True, eq=False)
class _Prepared:
    """Some modules of some adapters, ready to be computed and written."""

    files: dict[Path, Sink]
    jobs: list[CombineJob]
    places: list[list[tuple[Path, str]]]  # (directory, tensor) of every output
    packed: dict[str, list[tuple[Path, Update]]]  # modules whose tensors hold more than one factor
    used: list[Tensor]
    launch: dispatch.Launches | None = None  # of the jobs, unless they go through a device

    def write(self) -> None:
        with contextlib.ExitStack() as stack:
            descriptors = {d: stack.enter_context(f.open()) for d, f in self.files.items()}
            for job, places in zip(self.jobs, self.places, strict=True):
                for output, (directory, _) in zip(job.outputs, places, strict=True):
                    output.file = descriptors[directory]
            problem = stream.combine(self.jobs) if self.launch is None else self.launch.run()
        if problem is not None:
            directory, name = self.places[problem.job][problem.output]
            raise self.files[directory].error(name, problem.errno)
        for places in self.places:
            for directory, name in places:
                self.files[directory].written((name,))
        self._write_packed()
        release(self.used)

    def _write_packed(self) -> None:
        made: dict[Path, dict[str, tuple[Tensor, Tensor]]] = {}
        for dtype in {self.files[d].dtype for own in self.packed.values() for d, _ in own}:
            owners = {m: [(d, u) for d, u in own if self.files[d].dtype == dtype] for m, own in self.packed.items()}
            groups = materialise_groups([[u for _, u in own] for own in owners.values()], dtype)
            for (module, own), pairs in zip(owners.items(), groups, strict=True):
                for (directory, _), pair in zip(own, pairs, strict=True):
                    made.setdefault(directory, {})[module] = pair
        for directory, factors in made.items():
            self.files[directory].put(factors)


def _prepare(
    files: dict[Path, Sink], adapters: Mapping[Path, LoraData], modules: Sequence[str], owners: Sequence[Path]
) -> _Prepared:
    prepared = _Prepared(files, [], [], {}, [])
    for module in modules:
        updates: list[tuple[Path, Update]] = []
        for directory in owners:
            update = adapters[directory].updates.get(module)
            if update is None or not update.rank:
                continue
            if files[directory].is_packed(module):
                prepared.packed.setdefault(module, []).append((directory, update.baked()))
            else:
                updates.append((directory, update.baked()))
        for side in SIDES:
            _write_side(prepared, module, side, [(d, u.B if side == "B" else u.A) for d, u in updates])
    prepared.used += sources(u for own in prepared.packed.values() for _, u in own)
    if stream.current() is None:
        prepared.launch = dispatch.prepared("combine_pass", prepared.jobs)
    return prepared


def _write_side(prepared: _Prepared, module: str, side: Side, factors: Sequence[tuple[Path, Factor]]) -> None:
    """The job that computes and writes one side of a module of some adapters."""
    found = Sources()
    outputs, places = [], []
    for directory, factor in factors:
        file = prepared.files[directory]
        stored = factor.stored
        name, offset = file.place(module, side)
        if stored is not None and stored.dtype == file.dtype and stored.is_contiguous():
            outputs.append(CombineOutput.copy(stored, -1, offset, True))
            prepared.used.append(stored)
        else:
            terms = found.terms(factor)
            outputs.append(CombineOutput(factor.shape, file.dtype, terms, None, -1, offset, True))
        places.append((directory, name))
    if outputs:
        prepared.jobs.append(CombineJob(found.tensors, outputs, side == "A"))
        prepared.places.append(places)
        prepared.used += found.tensors
