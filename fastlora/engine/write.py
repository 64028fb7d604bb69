"""Writing adapters: factors are computed where they are written from, a module at a time in every thread."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import SIDES, Side
from fastlora.core.inert import loadable
from fastlora.core.updates import Update, sources
from fastlora.engine import stream
from fastlora.engine.balance import balanced
from fastlora.engine.belonging import require_one_module
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.engine.contracts import OpenSink, Sink
from fastlora.engine.materialise import materialise_groups
from fastlora.engine.schedule import split_to_fit
from fastlora.ops import dispatch
from fastlora.ops.passes import CombineJob, CombineOutput
from fastlora.runtime import ranks
from fastlora.runtime.cpython import paused_collector
from fastlora.runtime.memory import is_bounded, release
from fastlora.runtime.progress import track

WRITE_BYTES = 128 * 2**20
SMALL_BYTES = 2**20  # a thread that writes beside this one would take longer to start than they take to write
PREPARED = 2  # batches of modules that are ready while one is written
# Files that are written at once, so that no more than 128 are open with those of the batches that are ready: a
# decomposition of many pairs has more of them than a process may hold open.
OPEN_FILES = 128 // (PREPARED + 1)


@paused_collector()
def write_adapters(
    adapters: Mapping[Path, LoraData],
    targets: Mapping[Path, torch.dtype],
    open_sink: OpenSink,
    meanwhile: Callable[[], object],
) -> list[str]:
    """Writes adapters that share stored matrices into the sinks of their directories, in the ``targets``' dtypes; each
    stored matrix is read once, and once more where the range of float16 asks for a look at sizes.

    Returns what is worth telling, in sentences: digits that a dtype does not hold.

    Modules of rank 0 are left out; an adapter with nothing in it is written as zeros of rank 1, which PEFT can load.
    Factors are computed where they are written from, a module at a time in every thread, so memory does not grow with
    the model; one thread prepares the next modules meanwhile. Those of a device are computed there, and copied while
    modules before them are written. ``meanwhile`` is called while the last are written.
    Ranks that work together write one set of files: each its modules, and the first what belongs to none; ``meanwhile``
    is the first's alone.
    """
    fitting, losses = balanced(adapters, targets)
    adapters = {d: loadable(a) for d, a in fitting.items()}
    files: dict[Path, Sink] = {}

    def open_files() -> None:
        for directory, adapter in adapters.items():
            outlines = {m: outline(u, targets[directory]) for m, u in adapter.updates.items() if u.rank}
            files[directory] = open_sink(directory, adapter, outlines, targets[directory])

    def ended(directories: Iterable[Path]) -> None:
        if ranks.current() is None:  # nobody else writes into these files
            for directory in directories:
                file = files.pop(directory)
                file.finish()
                file.close()

    def written() -> list[set[str]]:
        _write_modules(files, adapters, targets, meanwhile if ranks.is_first() else lambda: None, ended)
        for file in files.values() if ranks.is_first() else ():
            file.finish()
        return [file.missing() for file in files.values()]

    # The first rank makes the files that all write into; nobody writes before they are there.
    with ranks.one_file():
        ranks.gathered("opening files", open_files, alike=_alike(adapters) if ranks.current() else "")
    for file, *missing in zip(files.values(), *ranks.gathered("writing", written), strict=True):
        file.sent(set.union(*missing) - file.missing())
        file.written(file.missing() - set.intersection(*missing))
    if ranks.is_first():
        for file in files.values():
            file.close()
    return [loss.told(adapters[d].name, targets[d]) for d, loss in losses.items()]


def _alike(adapters: Mapping[Path, LoraData]) -> str:
    """What all ranks write alike."""
    return repr([(a.name, [(m, u.shape, u.rank) for m, u in a.updates.items()]) for a in adapters.values()])


def _write_modules(
    files: Mapping[Path, Sink],
    adapters: Mapping[Path, LoraData],
    targets: Mapping[Path, torch.dtype],
    meanwhile: Callable[[], object],
    ended: Callable[[Iterable[Path]], None],
) -> None:
    """Writes the modules of this rank; ``ended`` is told of directories that have all of theirs."""
    shares = [dict(list(files.items())[i : i + OPEN_FILES]) for i in range(0, len(files), OPEN_FILES)]
    on_host = all(a.device.type == "cpu" for a in adapters.values())
    turns = _in_turn(shares, adapters)
    if len(turns) == len(shares) == 1 and stream.current() is None and _bytes_written(adapters) <= SMALL_BYTES:
        modules = turns[0].modules
        batch = prepare_batch(shares[0], adapters if on_host else _on_host(adapters, targets, modules), modules)
        with batch.opened():
            batch.write()
        meanwhile()
        ended(list(files))
        return
    pending: deque[_Pending] = deque()

    def await_first() -> None:
        first = pending[0]
        first.written.result()
        pending.popleft()
        first.opened.close()
        ended(first.ended)

    def close_all() -> None:
        with contextlib.ExitStack() as all_files:
            for batch in pending:
                all_files.enter_context(batch.opened)

    with contextlib.ExitStack() as stack:
        stack.callback(close_all)
        # Of results that go through a device, one batch is computed while another is copied.
        worker = stack.enter_context(ThreadPoolExecutor(1 if stream.current() is None else stream.THREADS))
        for turn in track(turns, "writing"):
            here = adapters if on_host else _on_host(adapters, targets, turn.modules)
            for share in turn.shares:
                batch = prepare_batch(share, here, turn.modules)
                # Not by the worker: at every call of the system it would wait for its turn in the interpreter.
                opened = contextlib.ExitStack()
                opened.enter_context(batch.opened())
                # The backend and the bound on memory are context variables, which new threads do not see.
                written = worker.submit(contextvars.copy_context().run, batch.write)
                pending.append(_Pending(opened, written, list(share) if turn.is_last else []))
                if len(pending) > PREPARED:
                    await_first()
        meanwhile()
        while pending:
            await_first()


Share = Mapping[Path, Sink]
"""Files that are open at once."""


class _Pending(NamedTuple):
    """A batch that is being written into files that are ``opened``, and the directories that ``ended`` with it."""

    opened: contextlib.ExitStack
    written: Future[None]
    ended: Sequence[Path]


class _Turn(NamedTuple):
    """Which files get which modules; ``is_last``: no other turn has modules for these files."""

    shares: Sequence[Share]
    modules: Sequence[str]
    is_last: bool


def _in_turn(shares: Sequence[Share], adapters: Mapping[Path, LoraData]) -> list[_Turn]:
    """Which files get which modules, in turn: all files some modules, so that what is read for these is at hand for
    all; or where the files are small, some files all their modules, so that each is opened once."""
    if len(shares) > 1 and ranks.current() is None:  # ranks would have to agree
        by_share = [_module_batches([adapters[d] for d in share]) for share in shares]
        if all(len(own) <= 1 for own in by_share):
            return [_Turn([share], own[0], True) for share, own in zip(shares, by_share, strict=True) if own]
    batches = _module_batches(list(adapters.values()))
    return [_Turn(shares, modules, i == len(batches) - 1) for i, modules in enumerate(batches)]


def _on_host(
    adapters: Mapping[Path, LoraData], targets: Mapping[Path, torch.dtype], modules: Sequence[str]
) -> Mapping[Path, LoraData]:
    """The adapters with these modules alone, in host memory."""
    some = {d: replace(a, updates={m: a.updates[m] for m in modules if m in a.updates}) for d, a in adapters.items()}
    return stream.on_host(some, targets)


def _bytes_written(adapters: Mapping[Path, LoraData]) -> int:
    """About as many as the results of all modules have."""
    return sum(4 * u.rank * sum(u.shape) for a in adapters.values() for u in a.updates.values())


def outline(update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of the right shape without memory."""
    n, m = update.shape
    return _meta(n, update.rank, dtype), _meta(update.rank, m, dtype)


@functools.lru_cache(maxsize=256)
def _meta(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _module_batches(adapters: Sequence[LoraData]) -> list[list[str]]:
    """Module names in batches that are prepared together, those of this rank; the experts of one parameter stay
    together."""
    sizes: dict[str, int] = {}
    read: dict[str, dict[int, int]] = {}  # bytes of what a unit is made from, once each: more than a result of low rank
    units: dict[str, dict[str, None]] = {}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            unit = update.layout.container or module
            units.setdefault(unit, {})[module] = None
            sizes[unit] = sizes.get(unit, 0) + 4 * update.rank * sum(update.shape)
            if is_bounded():
                read.setdefault(unit, {}).update((id(s), s.nbytes) for s in sources([update]))
    sizes |= {unit: max(sizes[unit], sum(stored.values())) for unit, stored in read.items()}
    through = stream.current()
    most = WRITE_BYTES if through is None else min(WRITE_BYTES, through.group)
    mine = ranks.own(list(units), [sizes[unit] for unit in units])
    batches = split_to_fit([sizes[unit] for unit in mine], most)
    return [[m for i in batch for m in units[mine[i]]] for batch in batches]


class _FactorWrite(NamedTuple):
    """One factor on its way into a file."""

    directory: Path
    tensor: str  # its name in the file
    output: CombineOutput  # of the job that computes it


class _SideWrites(NamedTuple):
    """One side of a module of some adapters: the job, and what becomes of each of its outputs."""

    job: CombineJob
    factors: list[_FactorWrite]


@dataclass(slots=True, eq=False)
class WriteBatch:
    """Some modules of some adapters, ready to be computed and written.

    ``packed``: the modules whose tensors hold more than one factor. ``launch``: of the jobs, unless they go through a
    device.
    """

    sinks: Mapping[Path, Sink]
    sides: list[_SideWrites]
    packed: dict[str, list[tuple[Path, Update]]]
    launch: dispatch.Launches | None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Inside the block, the files are open."""
        with contextlib.ExitStack() as stack:
            descriptors = {d: stack.enter_context(sink.open()) for d, sink in self.sinks.items()}
            for side in self.sides:
                for write in side.factors:
                    write.output.file = descriptors[write.directory]
            yield

    def write(self) -> None:
        """Computes and writes, into files that are :meth:`opened`."""
        jobs = [side.job for side in self.sides]
        problem = stream.combine(jobs) if self.launch is None else self.launch.run()
        if problem is not None:
            failed = self.sides[problem.job].factors[problem.output]
            raise self.sinks[failed.directory].error(failed.tensor, problem.errno)
        written: dict[Path, list[str]] = {directory: [] for directory in self.sinks}
        for side in self.sides:
            for write in side.factors:
                written[write.directory].append(write.tensor)
        for directory, tensors in written.items():
            self.sinks[directory].written(tensors)
        self._write_packed()
        release(self._read_matrices())

    def _write_packed(self) -> None:
        made: dict[Path, dict[str, tuple[Tensor, Tensor]]] = {}
        for dtype in {self.sinks[d].dtype for updates in self.packed.values() for d, _ in updates}:
            of_dtype = {m: [(d, u) for d, u in us if self.sinks[d].dtype == dtype] for m, us in self.packed.items()}
            groups = materialise_groups([[u for _, u in updates] for updates in of_dtype.values()], dtype)
            for (module, updates), pairs in zip(of_dtype.items(), groups, strict=True):
                for (directory, _), pair in zip(updates, pairs, strict=True):
                    made.setdefault(directory, {})[module] = pair
        for directory, factors in made.items():
            self.sinks[directory].put(factors)

    def _read_matrices(self) -> Iterator[Tensor]:
        """The stored matrices that were read: those behind results, and those that were written as they are."""
        for job, _ in self.sides:
            yield from job.factors
            yield from (output.out for output in job.outputs if output.out is not None)
        yield from sources(u for updates in self.packed.values() for _, u in updates)


def prepare_batch(sinks: Mapping[Path, Sink], adapters: Mapping[Path, LoraData], modules: Sequence[str]) -> WriteBatch:
    """What some modules of ``adapters`` need to get into the ``sinks`` of their directories."""
    sides: list[_SideWrites] = []
    packed: dict[str, list[tuple[Path, Update]]] = {}
    for module in modules:
        updates: list[tuple[Path, Update]] = []
        for directory in sinks:
            update = adapters[directory].updates.get(module)
            if update is None or not update.rank:
                continue
            if sinks[directory].is_packed(module):
                packed.setdefault(module, []).append((directory, update.baked()))
            else:
                updates.append((directory, update.baked()))
        if updates:
            require_one_module([u for _, u in updates])
            sides += (_side_writes(sinks, module, side, updates) for side in SIDES)
    launch = dispatch.prepared("combine_pass", [side.job for side in sides]) if stream.current() is None else None
    return WriteBatch(sinks, sides, packed, launch)


def _side_writes(
    sinks: Mapping[Path, Sink], module: str, side: Side, updates: Sequence[tuple[Path, Update]]
) -> _SideWrites:
    """How one side of a module of some adapters is computed and written."""
    wanted, tensors = [], []
    for directory, update in updates:
        sink = sinks[directory]
        tensor, offset = sink.place(module, side)
        factor = sink.lay(module, side, update.B if side == "B" else update.A)
        wanted.append(WantedFactor(factor, sink.dtype, None, offset))
        tensors.append(tensor)
    job = combine_job(wanted)
    placed = zip(updates, tensors, job.outputs, strict=True)
    return _SideWrites(job, [_FactorWrite(directory, tensor, output) for (directory, _), tensor, output in placed])
