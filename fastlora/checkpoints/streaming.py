"""Files of a base model, written again with some tensors changed: unit by unit, in any order, by several threads.

Every output file is made at its full size first. What does not change is copied by the system; sums of products go
from file to file in compiled tiles (op ``add_products``); other changes pass by in tiles of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from fastlora.checkpoints.base import Base
from fastlora.checkpoints.edits import Edit, LowRank, Merged, blocks, fingerprint, products
from fastlora.checkpoints.layout import Change, OutputFile, Unit, units
from fastlora.checkpoints.plan import Plan
from fastlora.checkpoints.turns import Turns
from fastlora.engine import shares
from fastlora.errors import InputError, OutputError
from fastlora.files.disk_errors import PART
from fastlora.files.tensor_files import StoredTensor
from fastlora.files.tensor_writing import make_file
from fastlora.files.tile_reads import Scratch, TileReads
from fastlora.files.unfinished import ResumableOutput
from fastlora.ops.add_products import FilePlace, ProductProblem, add_products
from fastlora.runtime import joint_outputs, ranks
from fastlora.runtime.memory import release
from fastlora.runtime.progress import bytes_bar
from fastlora.runtime.system import copy_at, write_all_at

TILE_BYTES = 2 * 2**20


def write_tensors(
    base: Base, plan: Plan, files: Sequence[OutputFile], output: ResumableOutput, folder: Path, record: object
) -> None:
    """Writes all files of tensors into ``folder``, except for what an unfinished run had finished; they keep names
    that nothing loads. Ranks that work together share the units."""
    done = output.begin_together(_digest(base, plan, record))
    joint_outputs.require_common("apply")
    targets = {file.path: joint_outputs.place(part_of(folder, file)) for file in files}
    made = ranks.from_first("making the files", lambda: _made(files, targets, anew=not done))
    changes = {name: Change(plan.shapes[name], all(map(_by_rows, edits))) for name, edits in plan.edits.items()}
    todo = [unit for unit in units(files, changes) if unit.key not in done or unit.file.path in made]
    mine = ranks.own(todo, [unit.size for unit in todo])
    ranks.gathered("applying", lambda: _run(plan, mine, targets, output))


def _by_rows(edit: Edit) -> bool:
    """Whether rows can be changed without the others."""
    return not edit.is_measured and not isinstance(edit, Merged)


def part_of(folder: Path, file: OutputFile) -> Path:
    """A file in ``folder`` while it is not whole."""
    return folder / (str(file.path) + PART)


def _made(files: Sequence[OutputFile], targets: Mapping[Path, Path], *, anew: bool) -> set[Path]:
    """Makes all files that are not there, and returns which it made. The system takes a while to find room for one, so
    several are made at once."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        made = pool.map(lambda file: _is_made(file, targets[file.path], anew=anew), files)
        return {file.path for file, is_made in zip(files, made, strict=True) if is_made}


def _is_made(file: OutputFile, target: Path, *, anew: bool) -> bool:
    """Makes a file of its full size, unless it is there; whether it was made."""
    if not anew and target.exists() and target.stat().st_size == file.size:
        return False
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make_file(target, file.header, file.size)
    return True


def _digest(base: Base, plan: Plan, record: object) -> str:
    """Of all that the output depends on: a run is resumed only where it is the same."""
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True, default=str).encode(), digest_size=16)
    for file in base.files():
        state = file.stat()
        digest.update(repr((file.name, state.st_size, state.st_mtime_ns)).encode())
    names = sorted(plan.edits)
    sizes = [sum(t.nbytes for edit in plan.edits[name] for t in edit.tensors()) for name in names]

    def work() -> dict[str, str]:
        return {name: fingerprint(plan.edits[name]) for name in ranks.own(names, sizes)}

    prints = shares.each("comparing with an unfinished run", work, (), repr((names, sizes)))
    for name in names:
        digest.update(f"{name} {prints[name]}".encode())
    return digest.hexdigest()


def _run(plan: Plan, todo: Sequence[Unit], targets: Mapping[Path, Path], output: ResumableOutput) -> None:
    """Does all units, as many at once as there are threads; what stops one stops all."""
    lock, turns, threads = threading.Lock(), Turns(todo), max(1, torch.get_num_threads())
    with (
        TileReads() as reads,
        _opened(targets) as descriptors,
        bytes_bar(sum(unit.size for unit in todo), "applying") as advance,
        ThreadPoolExecutor(threads) as pool,
    ):

        def work() -> None:
            for unit in turns.taken():
                edits = plan.edits.get(unit.place.name, []) if unit.place is not None else []
                do(unit, edits, reads, descriptors[unit.file.path])
                release(tensor for edit in edits for tensor in edit.tensors())
                output.finish(unit.key)
                with lock:
                    advance(unit.size)

        pending = [pool.submit(work) for _ in range(threads)]
        try:
            for future in as_completed(pending):
                future.result()
        except BaseException:
            turns.stop()
            raise


@contextlib.contextmanager
def _opened(targets: Mapping[Path, Path]) -> Iterator[dict[Path, int]]:
    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(target.open("r+b", buffering=0)).fileno() for path, target in targets.items()}


def do(unit: Unit, edits: Sequence[Edit], reads: TileReads, target: int) -> None:
    """One unit. Raises :class:`InputError` for a source that cannot be read, :class:`OutputError` for numbers that do
    not fit, :class:`OSError` for a target that cannot be written."""
    source = reads.descriptor(unit.file.source)
    if unit.place is None:
        _copy(unit.file.source, source, unit.first, unit.last, target, unit.offset)
        return
    _measure(unit, edits, reads)
    for first, last, changes in blocks(edits, unit.first, unit.last):
        low_rank = [e for e in changes if isinstance(e, LowRank)]
        if len(low_rank) == len(changes):
            _add(unit, low_rank, first, last, source, target)
        elif len(changes) == 1 and isinstance(changes[0], Merged) and _fits(unit, changes[0]):
            _merge(unit, changes[0], first, last, reads, target)
        else:
            formed = [e.formed() if isinstance(e, Merged) else e for e in changes]
            _change(unit, formed, first, last, reads, target)


def _copy(path: Path, source: int, start: int, end: int, target: int, offset: int) -> None:
    if copy_at(source, target, start, end, offset) < end - start:
        raise InputError(f"{path} is shorter than its header says; it was changed or cut off: copy it again")


def _add(unit: Unit, edits: Sequence[LowRank], first: int, last: int, source: int, target: int) -> None:
    """Sums of products, or nothing but another dtype, of some rows."""
    place, (_, columns) = unit.place, unit.shape
    assert place is not None and place.dtype is not None and place.stored.dtype is not None
    before, behind = (first * columns * dtype.itemsize for dtype in (place.stored.dtype, place.dtype))
    if not edits and place.dtype == place.stored.dtype:
        start, end = place.stored.offset + before, place.stored.offset + last * columns * place.dtype.itemsize
        _copy(unit.file.source, source, start, end, target, place.offset + behind)
        return
    task = products(edits, first, last, columns, (place.stored.dtype, place.dtype))
    problem = add_products(
        task, FilePlace(source, place.stored.offset + before), FilePlace(target, place.offset + behind)
    )
    if problem is not None:
        raise _error(problem, unit)


def _measure(unit: Unit, edits: Sequence[Edit], reads: TileReads) -> None:
    """Looks at all rows of those edits that have to know them first."""
    scratch = Scratch()
    for edit in edits:
        if edit.is_measured:
            for row, end in _tiles(unit, edit.at, edit.at + edit.height):
                wide = _wide(_tile(unit, row, end, reads, scratch), [edit])[:, edit.left : edit.left + edit.width]
                edit.measure(wide.contiguous(), row - edit.at)


def _change(unit: Unit, edits: Sequence[Edit], first: int, last: int, reads: TileReads, target: int) -> None:
    """Some rows, tile by tile: they are read, changed, rounded once, and written to their place."""
    scratch, place = Scratch(), unit.place
    assert place is not None and place.dtype is not None
    for row, end in _tiles(unit, first, last):
        changed = _changed(_tile(unit, row, end, reads, scratch), row, edits).to(place.dtype)
        if not bool(changed.isfinite().all()):
            raise _error(ProductProblem("not finite"), unit)
        _put(unit, changed, row, target)


def _fits(unit: Unit, edit: Merged) -> bool:
    """Whether a merged matrix goes straight onto the rows that it changes."""
    assert unit.place is not None
    return edit.is_whole and edit.width == unit.shape[1] and unit.place.dtype == unit.place.stored.dtype


def _merge(unit: Unit, edit: Merged, first: int, last: int, reads: TileReads, target: int) -> None:
    """Rows onto which a method merges elements: they are in memory together."""
    rows = _tile(unit, first, last, reads, Scratch())
    if not edit.add_to(rows) or not bool(rows.isfinite().all()):
        raise _error(ProductProblem("not finite"), unit)
    _put(unit, rows, first, target)


def _put(unit: Unit, rows: Tensor, first: int, target: int) -> None:
    assert unit.place is not None
    memory = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    write_all_at(target, memory, unit.place.offset + first * unit.shape[1] * rows.dtype.itemsize)


def _tiles(unit: Unit, first: int, last: int) -> Iterator[tuple[int, int]]:
    stored = _stored(unit)
    assert stored.dtype is not None
    tall = max(1, TILE_BYTES // max(1, unit.shape[1] * stored.dtype.itemsize))
    for row in range(first, last, tall):
        yield row, min(row + tall, last)


def _tile(unit: Unit, row: int, end: int, reads: TileReads, scratch: Scratch) -> Tensor:
    stored, columns = _stored(unit), unit.shape[1]
    assert stored.dtype is not None
    size = columns * stored.dtype.itemsize
    reads.read(unit.file.source, stored.offset + row * size, scratch.bytes((end - row) * size))
    return scratch.tensor(stored.dtype, (end - row, columns))


def _stored(unit: Unit) -> StoredTensor:
    assert unit.place is not None
    return unit.place.stored


def _wide(tile: Tensor, edits: Sequence[Edit]) -> Tensor:
    double = tile.dtype.itemsize > 2 or any(e.is_wide for e in edits)
    return tile.to(torch.float64 if double else torch.float32)


def _changed(tile: Tensor, row: int, edits: Sequence[Edit]) -> Tensor:
    """The rows of a tile with their changes, before they are rounded."""
    wide = _wide(tile, edits)
    total = wide.clone()
    for edit in edits:
        part = wide[:, edit.left : edit.left + edit.width]
        place = total[:, edit.left : edit.left + edit.width]
        if len(edits) == 1:
            place.copy_(edit.alone(part.contiguous(), row - edit.at))
        else:
            place += edit.change(part.contiguous(), row - edit.at)
    return total


def _error(problem: ProductProblem, unit: Unit) -> Exception:
    """What stopped a change, told as it is everywhere."""
    assert unit.place is not None
    name, dtype, path = unit.place.name, unit.place.dtype, unit.file.source
    if problem.what == "write":
        return OSError(problem.errno, os.strerror(problem.errno))
    if problem.what == "read":
        return InputError(f"{path} cannot be read ({os.strerror(problem.errno)}); check the disk")
    if problem.what == "short":
        return InputError(f"{path} is shorter than its header says; it was changed or cut off: copy it again")
    if dtype == torch.float16:
        return OutputError(
            f"{name} would leave the range of float16; apply to the model in bfloat16 or float32 (dtype=, --dtype), or "
            "with smaller weights"
        )
    return OutputError(
        f"{name} would hold NaN or infinity: the model does, or weights are too large; look at it with `fastlora "
        "inspect`, or apply with smaller weights"
    )
