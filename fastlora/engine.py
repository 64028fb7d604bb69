"""Runs ops over whole models: which modules go into one launch, and how factors are read and written.

Methods hand in lists of factors; the engine turns them into passes (``gram``: one read; ``combine``: one read and one
write) over the matrices where they lie.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora import backends, stream
from fastlora.adapter import Adapter, Factor, Side, Update, source_key
from fastlora.backends.passes import CombineJob, CombineOutput, CombineTerm, GramJob, WriteProblem
from fastlora.errors import InputError, NonFiniteError
from fastlora.interpreter import paused_collector, quick_handover
from fastlora.memory import Room, batch_bytes, padded, release
from fastlora.offload import on_host
from fastlora.progress import track

if TYPE_CHECKING:
    from fastlora.formats.peft_write import AdapterFile

WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}

# Modules computed at once: their Gram blocks and coefficients are what is in memory besides the factors.
CHUNK_BYTES = 256 * 2**20
# Results whose computing and writing is prepared while as many are computed and written.
WRITE_BYTES = 128 * 2**20
PREPARED = 2  # batches of modules that are ready while one is written
# Files that are written at once: a decomposition of many pairs has more of them than a process may hold open.
OPEN_FILES = 128
SIDES: tuple[Side, Side] = ("B", "A")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The widest of the dtypes; float16 with bfloat16 needs float32, which holds both."""
    found = set(dtypes) or {torch.float32}
    if {torch.float16, torch.bfloat16} <= found:
        found.add(torch.float32)
    return max(found, key=WIDTHS.index)


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype) -> torch.dtype:
    """A dtype that adapters are saved in; ``None`` gives the default (float64 inputs are saved as float32)."""
    if dtype is None:
        return torch.float32 if default == torch.float64 else default
    found = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"dtype {dtype!r}: adapters are saved as float32, bfloat16 or float16")
    return found


def chunks(count: int, bytes_each: int, most: int = CHUNK_BYTES) -> Iterable[range]:
    """Ranges of modules that fit in memory together. Results do not depend on the split."""
    size = max(1, batch_bytes(most) // max(bytes_each, 1))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def sources(updates: Iterable[Update]) -> list[Tensor]:
    """Every stored matrix behind some updates."""
    return [t.source for u in updates for f in (u.B, u.A) for t in f.terms]


def device_of(modules: Sequence[Sequence[Factor]]) -> torch.device:
    """Where the factors are: those of a pool are together."""
    return next((t.source.device for factors in modules for f in factors for t in f.terms), torch.device("cpu"))


def run_pass(op: str, jobs: Sequence[GramJob] | Sequence[CombineJob]) -> WriteProblem | None:
    """One pass on the backend that takes it."""
    problem: WriteProblem | None = backends.run(op, jobs) if jobs else None
    return problem


def materialise(updates: Sequence[Update], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """``(B [out, r], A [r, in])`` of each update in ``dtype``, scaling not included (see :meth:`Update.baked`).

    A factor that is a stored matrix of that dtype is returned as it is, bit for bit. Updates that share stored
    matrices should be passed together: each is read once.
    """
    return materialise_groups([updates], dtype)[0]


@paused_collector()
def materialise_groups(
    groups: Sequence[Sequence[Update]], dtype: torch.dtype, room: Room | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """:func:`materialise` for many groups of updates in one launch; the updates of a group share stored matrices.

    ``room``: where results go, until it is reserved again; memory of their own by default.
    """
    sides = [side for group in groups for side in ([u.B for u in group], [u.A for u in group])]
    stored = [[_stored_as(f, dtype) for f in side] for side in sides]
    room = room or Room(device_of(sides))
    room.reserve(
        sum(
            padded(f.length * f.rank * dtype.itemsize)
            for side, found in zip(sides, stored, strict=True)
            for f, s in zip(side, found, strict=True)
            if s is None
        )
    )
    jobs: list[CombineJob] = []
    results = [_materialise_side(jobs, *pair, dtype, room) for pair in zip(sides, stored, strict=True)]
    run_pass("combine_pass", jobs)
    return [list(zip(*pair, strict=True)) for pair in zip(results[::2], results[1::2], strict=True)]


def _stored_as(factor: Factor, dtype: torch.dtype) -> Tensor | None:
    """The stored matrix that a factor is, if it has that dtype."""
    stored = factor.stored
    return stored if stored is not None and stored.dtype == dtype else None


def _materialise_side(
    jobs: list[CombineJob], factors: Sequence[Factor], stored: Sequence[Tensor | None], dtype: torch.dtype, room: Room
) -> list[Tensor]:
    """The tensors of some factors of one side; those that are not ``stored`` are put on the job list."""
    shapes = [factor.shape for factor, found in zip(factors, stored, strict=True) if found is None]
    outs = iter([out for shape, same in groupby(shapes) for out in room.take(shape, dtype, len(list(same)))])
    results = [next(outs) if found is None else found for found in stored]
    sources = Sources()
    outputs = [
        CombineOutput(factor.shape, dtype, sources.terms(factor), out)
        for factor, found, out in zip(factors, stored, results, strict=True)
        if found is None and factor.rank
    ]
    if outputs:
        jobs.append(CombineJob(sources.tensors, outputs, factors[0].side == "A"))
    return results


class Sources:
    """The distinct stored matrices of a combine job, in order of first use."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}
        self._places: dict[int, list[int]] = {}  # by address

    def terms(self, factor: Factor) -> list[CombineTerm]:
        """The terms of a factor on these matrices."""
        found = []
        for term in factor.terms:
            index = self._index.get(id(term.source))
            if index is None:
                index = self._index[id(term.source)] = self._place(term.source)
            found.append((index, term.coefficient, term.at, term.scale))
        return found

    def _place(self, source: Tensor) -> int:
        """Of a tensor that was not met before: that of another view of the same memory, or a new one."""
        here = self._places.setdefault(source.data_ptr(), [])
        for index in here:
            if source_key(self.tensors[index]) == source_key(source):
                return index
        here.append(len(self.tensors))
        self.tensors.append(source)
        return here[-1]


def require_finite(adapters: Iterable[Adapter]) -> None:
    """Raises for the first stored matrix that holds NaN or Inf. Costs one read; gram passes find the same for free."""
    for adapter in adapters:
        for module in track(adapter.modules, f"checking {adapter.name}"):
            for factor in (adapter.updates[module].B, adapter.updates[module].A):
                for term in factor.terms:
                    if not is_finite(term.source):
                        raise not_finite(adapter.name, module, factor.side)
            release(sources([adapter.updates[module]]))


def is_finite(tensor: Tensor) -> bool:
    """Whether a matrix holds neither NaN nor Inf."""
    return bool(backends.run("finite", tensor))


def not_finite(adapter: str, module: str, side: str) -> NonFiniteError:
    return NonFiniteError(
        f"adapter {adapter!r}: lora_{side} of {module} holds NaN or Inf, so nothing computed from it would mean "
        "anything. Leave this adapter out, or save it again from a training step that did not diverge"
    )


def check_diagonal(names: Sequence[str], modules: Sequence[str], gram: Tensor, side: str) -> None:
    """Raises when a factor holds NaN or Inf, as its diagonal Gram block shows: ``gram [len(modules), k, k, r, r]`` or
    its diagonal blocks ``[len(modules), k, r, r]``."""
    blocks = gram.diagonal(dim1=1, dim2=2).movedim(-1, 1) if gram.dim() == 5 else gram
    squares = blocks.diagonal(dim1=2, dim2=3)
    if math.isfinite(float(squares.sum())):  # a sum may overflow where no square does
        return
    bad = (~squares.isfinite()).any(-1).nonzero().tolist()
    if bad:
        module, adapter = bad[0]
        raise not_finite(names[adapter], modules[module], side)


def save_adapter(
    adapter: Adapter, path: Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False
) -> Path:
    """Writes one adapter as a PEFT directory, atomically."""
    from fastlora.output import OutputDirectory

    with OutputDirectory(path, overwrite=overwrite) as staging:
        write_adapter(adapter, staging, dtype)
    return path


def write_adapter(adapter: Adapter, directory: Path, dtype: torch.dtype | str | None = None) -> None:
    """Writes one adapter into a directory that is being staged."""
    write_adapters({directory: adapter}, dtype)


def write_adapters(
    adapters: Mapping[Path, Adapter],
    dtype: torch.dtype | str | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Writes adapters that share stored matrices, reading each of those once.

    Modules of rank 0 are left out; an adapter with nothing in it is written as zeros of rank 1, which PEFT can load.
    Factors are computed where they are written from, a module at a time in every thread, so memory does not grow with
    the model; one thread prepares the next modules meanwhile. ``meanwhile`` is called while the last are written.
    """
    with paused_collector(), quick_handover():
        targets = {d: parse_dtype(dtype, a.dtype) for d, a in adapters.items()}
        _write_adapters(on_host(adapters, targets), targets, meanwhile)


def _write_adapters(
    adapters: Mapping[Path, Adapter], targets: Mapping[Path, torch.dtype], meanwhile: Callable[[], object]
) -> None:
    from fastlora.formats.peft_write import AdapterFile

    empty = {d: zero_factors(a, targets[d]) for d, a in adapters.items() if not any(u.rank for u in a.updates.values())}
    files: dict[Path, AdapterFile] = {}
    for directory, adapter in adapters.items():
        outlines = {m: _outline(u, targets[directory]) for m, u in adapter.updates.items() if u.rank} or empty[
            directory
        ]
        files[directory] = AdapterFile(directory, adapter, outlines, targets[directory])
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


def _module_batches(adapters: Sequence[Adapter]) -> list[list[str]]:
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

    files: dict[Path, AdapterFile]
    jobs: list[CombineJob]
    places: list[list[tuple[Path, str]]]  # (directory, tensor) of every output
    packed: dict[str, list[tuple[Path, Update]]]  # modules whose tensors hold more than one factor
    used: list[Tensor]
    launch: backends.Launches | None = None  # of the jobs, unless they go through a device

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
    files: dict[Path, AdapterFile], adapters: Mapping[Path, Adapter], modules: Sequence[str], owners: Sequence[Path]
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
        prepared.launch = backends.prepared("combine_pass", prepared.jobs)
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


def zero_factors(adapter: Adapter, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Rank-1 zeros for the first module, so that an empty result can be loaded."""
    for module, update in adapter.updates.items():
        n, m = update.shape
        return {module: (torch.zeros(n, 1, dtype=dtype), torch.zeros(1, m, dtype=dtype))}
    raise InputError(f"adapter {adapter.name!r} has no modules, so there is nothing to write")


def with_rank_zero(update: Update) -> Update:
    """An update of the same module that is zero."""
    empty = {"rank": 0, "terms": ()}
    return replace(update, B=replace(update.B, **empty), A=replace(update.A, **empty), scaling=1.0)  # type: ignore[arg-type]
