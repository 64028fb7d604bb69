"""Runs ops over whole models: which modules go into one launch, and how factors are read and written.

Methods hand in lists of factors; the engine turns them into passes (``gram``: one read; ``combine``: one read and one
write) over the matrices where they lie.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.adapter import Adapter, Factor, Update, source_key
from fastlora.backends import resolve
from fastlora.backends.passes import CombineJob, CombineTerm, GramJob
from fastlora.errors import InputError, NonFiniteError
from fastlora.gramcache import run_gram
from fastlora.memory import Room, batch_bytes, padded, release
from fastlora.progress import track

if TYPE_CHECKING:
    from fastlora.formats.peft_write import AdapterFile

Pairs = Sequence[tuple[int, int]]

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
# Results that are computed while as many are being written.
WRITE_BYTES = 64 * 2**20


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


def chunks(count: int, bytes_each: int) -> Iterable[range]:
    """Ranges of modules that fit in memory together. Results do not depend on the split."""
    size = max(1, batch_bytes(CHUNK_BYTES) // max(bytes_each, 1))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def sources(updates: Iterable[Update]) -> list[Tensor]:
    """Every stored matrix behind some updates."""
    return [t.source for u in updates for f in (u.B, u.A) for t in f.terms]


def gram_blocks(modules: Sequence[Sequence[Factor]], r: int, pairs: Pairs) -> Tensor:
    """Gram blocks of the ``k`` factors of each module, all of one side.

    Returns float64 ``[len(modules), k, k, r, r]``, zero-padded to ``r``, with the blocks of ``pairs`` filled.
    """
    k = len(modules[0])
    out = torch.zeros(len(modules), k, k, r, r, dtype=torch.float64)
    jobs, pending = [], []
    for m, factors in enumerate(modules):
        rows = factors[0].side == "A"
        stored = [f.stored for f in factors]
        if all(s is not None for s in stored):
            blocks = [(i, j, out[m, i, j, : factors[i].rank, : factors[j].rank]) for i, j in pairs]
            jobs.append(GramJob([s for s in stored if s is not None], blocks, rows))
        else:
            job, coefficients, block = _source_gram(factors, rows)
            jobs.append(job)
            pending.append((m, coefficients, block))
    run_gram(jobs, lambda unknown: _run("gram_pass", unknown))
    for m, coefficients, block in pending:
        full = block.triu() + block.triu(1).mT
        for i, j in pairs:
            (at, left), (to, right) = coefficients[i], coefficients[j]
            out[m, i, j, : left.shape[1], : right.shape[1]] = left.mT @ full[at][:, to] @ right
    return out


def _source_gram(factors: Sequence[Factor], rows: bool) -> tuple[GramJob, list[tuple[Tensor, Tensor]], Tensor]:
    """The Gram matrix of the distinct stored matrices behind some factors, and each factor's coefficients on them.

    The coefficients are ``(index, C)``: ``C`` belongs to the rows ``index`` of the Gram matrix. The others are left out
    and not multiplied by zero, so that NaN or Inf in one adapter is not found in another.
    """
    places: dict[object, int] = {}
    sources: list[Tensor] = []
    total = 0
    for factor in factors:
        for term in factor.terms:
            if source_key(term.source) not in places:
                places[source_key(term.source)] = total
                sources.append(term.source)
                total += term.source.shape[0 if rows else 1]
    coefficients = []
    for factor in factors:
        own = factor.coefficients()
        index = [torch.arange(c.shape[0]) + places[source_key(source)] for source, c in own]
        stacked = [c for _, c in own]
        coefficients.append(
            (torch.cat(index), torch.cat(stacked))
            if own
            else (torch.zeros(0, dtype=torch.int64), torch.zeros(0, factor.rank, dtype=torch.float64))
        )
    block = torch.zeros(total, total, dtype=torch.float64)
    starts = [places[source_key(s)] for s in sources]
    ranks = [s.shape[0 if rows else 1] for s in sources]
    blocks = [
        (i, j, block[starts[i] : starts[i] + ranks[i], starts[j] : starts[j] + ranks[j]])
        for i in range(len(sources))
        for j in range(i, len(sources))
    ]
    return GramJob(sources, blocks, rows), coefficients, block


def _run(op: str, jobs: Sequence[GramJob] | Sequence[CombineJob]) -> None:
    if jobs:
        resolve(op, jobs).launch(jobs)


def materialise(updates: Sequence[Update], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """``(B [out, r], A [r, in])`` of each update in ``dtype``, scaling not included (see :meth:`Update.baked`).

    A factor that is a stored matrix of that dtype is returned as it is, bit for bit. Updates that share stored
    matrices should be passed together: each is read once.
    """
    return materialise_groups([updates], dtype)[0]


def materialise_groups(
    groups: Sequence[Sequence[Update]], dtype: torch.dtype, room: Room | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """:func:`materialise` for many groups of updates in one launch; the updates of a group share stored matrices.

    ``room``: where results go, until it is reserved again; memory of their own by default.
    """
    room = room or Room()
    room.reserve(sum(_bytes(f, dtype) for group in groups for u in group for f in (u.B, u.A)))
    jobs: list[CombineJob] = []
    results = []
    for group in groups:
        left = _combine_side(jobs, [u.B for u in group], dtype, room)
        right = _combine_side(jobs, [u.A for u in group], dtype, room)
        results.append(list(zip(left, right, strict=True)))
    _run("combine_pass", jobs)
    return results


def _bytes(factor: Factor, dtype: torch.dtype) -> int:
    """What a factor takes in a room: nothing if it is a stored matrix of that dtype."""
    stored = factor.stored
    if stored is not None and stored.dtype == dtype:
        return 0
    return padded(factor.length * factor.rank * dtype.itemsize)


def _combine_side(jobs: list[CombineJob], factors: Sequence[Factor], dtype: torch.dtype, room: Room) -> list[Tensor]:
    """The tensors of some factors of one side; those that have to be computed are put on the job list."""
    results: list[Tensor] = []
    sources: list[Tensor] = []
    index: dict[object, int] = {}
    outputs = []
    for factor in factors:
        stored = factor.stored
        if stored is not None and stored.dtype == dtype:
            results.append(stored)
            continue
        shape = (factor.length, factor.rank) if factor.side == "B" else (factor.rank, factor.length)
        out = room.take(shape, dtype)
        results.append(out)
        if not factor.rank:
            continue
        terms = []
        for term in factor.terms:
            key = source_key(term.source)
            if key not in index:
                index[key] = len(sources)
                sources.append(term.source)
            terms.append(CombineTerm(index[key], term.coefficient, term.at, term.scale))
        outputs.append((out, terms))
    if outputs:
        jobs.append(CombineJob(sources, outputs, factors[0].side == "A"))
    return results


def require_finite(adapters: Iterable[Adapter]) -> None:
    """Raises for the first stored matrix that holds NaN or Inf. Costs one read; gram passes find the same for free."""
    for adapter in adapters:
        for module in track(adapter.modules, f"checking {adapter.name}"):
            for factor in (adapter.updates[module].B, adapter.updates[module].A):
                for term in factor.terms:
                    if not is_finite(term.source):
                        raise not_finite(adapter.name, module, factor.side)


def is_finite(tensor: Tensor) -> bool:
    """Whether a matrix holds neither NaN nor Inf."""
    return bool(resolve("finite", tensor).launch(tensor))


def not_finite(adapter: str, module: str, side: str) -> NonFiniteError:
    return NonFiniteError(
        f"adapter {adapter!r}: lora_{side} of {module} holds NaN or Inf, so nothing computed from it would mean "
        "anything. Leave this adapter out, or save it again from a training step that did not diverge"
    )


def check_diagonal(names: Sequence[str], modules: Sequence[str], gram: Tensor, side: str) -> None:
    """Raises when a factor holds NaN or Inf, as its diagonal Gram block shows: ``gram [len(modules), k, k, r, r]``."""
    diagonal = gram.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2)  # [g, k, r]
    bad = (~diagonal.isfinite()).any(-1).nonzero().tolist()
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


def write_adapters(adapters: Mapping[Path, Adapter], dtype: torch.dtype | str | None = None) -> None:
    """Writes adapters that share stored matrices, reading each of those once.

    Modules of rank 0 are left out; an adapter with nothing in it is written as zeros of rank 1, which PEFT can load.
    Modules are computed and written some at a time, one thread writing while the next are computed, so memory does
    not grow with the model.
    """
    from fastlora.formats.peft_write import AdapterFile

    targets = {d: parse_dtype(dtype, a.dtype) for d, a in adapters.items()}
    empty = {d: zero_factors(a, targets[d]) for d, a in adapters.items() if not any(u.rank for u in a.updates.values())}
    files: dict[Path, AdapterFile] = {}
    for directory, adapter in adapters.items():
        outlines = {m: _outline(u) for m, u in adapter.updates.items() if u.rank} or empty[directory]
        files[directory] = AdapterFile(directory, adapter, outlines, targets[directory])
    rooms = {target: (Room(), Room()) for target in targets.values()}  # one is filled while the other is written
    with ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for turn, modules in enumerate(track(_module_batches(list(adapters.values())), "writing")):
            computed = _compute(adapters, targets, modules, {t: pair[turn % 2] for t, pair in rooms.items()})
            if pending is not None:
                pending.result()
            # The backend and the bound on memory are context variables, which new threads do not see.
            pending = writer.submit(contextvars.copy_context().run, _put, files, adapters, computed)
            del computed
        if pending is not None:
            pending.result()
    for directory, file in files.items():
        file.put(empty.get(directory, {}))
        file.close()


Computed = dict[Path, dict[str, tuple[Tensor, Tensor]]]


def _outline(update: Update) -> tuple[Tensor, Tensor]:
    """Factors of the right shape without memory."""
    n, m = update.shape
    return torch.empty(n, update.rank, device="meta"), torch.empty(update.rank, m, device="meta")


def _module_batches(adapters: Sequence[Adapter]) -> list[list[str]]:
    """Module names in batches whose results fit in memory; the experts of one parameter stay together."""
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
            room = batch_bytes(WRITE_BYTES)
        batches[-1] += names
        room -= sizes[unit]
    return batches


def _compute(
    adapters: Mapping[Path, Adapter],
    targets: Mapping[Path, torch.dtype],
    modules: Sequence[str],
    rooms: Mapping[torch.dtype, Room],
) -> Computed:
    """The factors of some modules of every adapter, each in its own dtype."""
    computed: Computed = {d: {} for d in adapters}
    for target in dict.fromkeys(targets.values()):
        owners = [
            [d for d, a in adapters.items() if targets[d] == target and m in a.updates and a.updates[m].rank]
            for m in modules
        ]
        groups = [[adapters[d].updates[m].baked() for d in own] for m, own in zip(modules, owners, strict=True)]
        for module, own, pairs in zip(modules, owners, materialise_groups(groups, target, rooms[target]), strict=True):
            for directory, pair in zip(own, pairs, strict=True):
                computed[directory][module] = pair
    return computed


def _put(files: Mapping[Path, AdapterFile], adapters: Mapping[Path, Adapter], computed: Computed) -> None:
    for directory, factors in computed.items():
        files[directory].put(factors)
    release(sources(a.updates[m] for d, a in adapters.items() for m in computed[d]))


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
