"""Files of a base model, written again with some tensors changed: tile by tile, in any order, by several threads.

Every output file has the layout of its input and is made at its full size first, so that each tensor has its place
before a number is computed. What does not change is copied by the system (``copy_file_range``). Unfinished work lies in
``.NAME.unfinished`` beside the output, under names that no tool loads, with a journal of what is finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.checkpoints.base import Base
from fastlora.checkpoints.edits import Edit, LowRank, blocks, fingerprint, products
from fastlora.checkpoints.plan import Plan
from fastlora.errors import InputError, OutputError
from fastlora.files.disk_errors import writing
from fastlora.files.tensor_files import StoredTensor
from fastlora.files.tile_reads import Scratch, TileReads
from fastlora.ops.add_products import FilePlace, ProductProblem, add_products
from fastlora.runtime.progress import bytes_bar

TILE_BYTES = 2 * 2**20
COPY_BYTES = 32 * 2**20
PART = ".part"  # what no tool loads
JOURNAL = "journal"

Done = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """A file of tensors and its copy: ``shift`` is added to places in it, since its header is longer."""

    source: Path
    target: Path
    header: bytes
    shift: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What one thread does at once: bytes ``[start, end)`` of a file that are copied, or a tensor that changes."""

    key: str
    file: File
    start: int
    end: int
    name: str = ""


def write(base: Base, plan: Plan, out: Path, *, resume: bool, record: Mapping[str, object]) -> list[str]:
    """Writes the changed model to ``out``, a folder or, of a base that is a file, a file; returns notes.

    Raises :class:`OutputError` for what cannot be written, also beside an unfinished run unless it is resumed.
    """
    staging = out.with_name(f".{out.name}.unfinished")
    notes: list[str] = []
    digest = _digest(base, plan, record)
    with writing(out), _locked(staging, out, resume, notes) as folder:
        files = [_file(base, source, folder, out, record) for source in base.files()]
        done = _journal(folder, digest, out)
        units = [unit for file in files for unit in _units(base, plan, file)]
        for file in files:
            _make(file)
        _run(base, plan, [u for u in units if u.key not in done], folder)
        _finish(base, files, folder, out)
    return notes


@contextmanager
def _locked(staging: Path, out: Path, resume: bool, notes: list[str]) -> Iterator[Path]:
    """The folder of unfinished work, which one process holds at a time."""
    if staging.exists() and not resume:
        raise OutputError(
            f"an unfinished run for {out} is in {staging}: continue it with --resume (resume=True), or delete "
            "that folder"
        )
    if resume and not staging.exists():
        notes.append(f"there is no unfinished run for {out}; it was begun anew")
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"another process is writing {out}; wait for it, or write elsewhere") from None
    try:
        yield staging
    finally:
        os.close(lock)


def _digest(base: Base, plan: Plan, record: Mapping[str, object]) -> str:
    """Of all that the output depends on: a run is resumed only where it is the same."""
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True, default=str).encode(), digest_size=16)
    for file in base.files():
        state = file.stat()
        digest.update(repr((file.name, state.st_size, state.st_mtime_ns)).encode())
    for name in sorted(plan.edits):
        digest.update(f"{name} {fingerprint(plan.edits[name])}".encode())
    return digest.hexdigest()


def _journal(folder: Path, digest: str, out: Path) -> set[str]:
    """What was finished before, by keys; an empty journal is begun."""
    path = folder / JOURNAL
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if not lines or not lines[0]:
        path.write_text(digest + "\n", encoding="utf-8")
        return set()
    if lines[0] != digest:
        raise OutputError(
            f"the unfinished run for {out} was another one: the base model, the adapters or their weights differ. "
            f"Delete {folder} and begin anew"
        )
    return set(lines[1:-1])  # what follows the last line break was cut off


def _file(base: Base, source: Path, folder: Path, out: Path, record: Mapping[str, object]) -> File:
    with source.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    metadata = dict(header.get("__metadata__", {})) | {"fastlora": json.dumps(record, sort_keys=True, default=str)}
    text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8 - length) % 8)
    shift = len(text) - length
    relative = source.relative_to(base.root) if base.is_folder else Path(out.name)
    target = folder / relative.with_name(relative.name + PART)
    return File(source, target, len(text).to_bytes(8, "little") + text, shift, source.stat().st_size + shift)


def _make(file: File) -> None:
    """The output file at its full size, unless it is there from before."""
    if file.target.exists() and file.target.stat().st_size == file.size:
        return
    file.target.parent.mkdir(parents=True, exist_ok=True)
    with file.target.open("wb") as raw:
        raw.write(file.header)
        raw.flush()
        try:
            os.posix_fallocate(raw.fileno(), 0, file.size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            os.truncate(raw.fileno(), file.size)


def _units(base: Base, plan: Plan, file: File) -> Iterator[Unit]:
    """Tensors that change, and stretches of others between them."""
    inside = sorted((t.offset, t.offset + t.size, name) for name, t in base.tensors.items() if t.file == file.source)
    start = end = inside[0][0] if inside else file.size - file.shift
    for first, last, name in inside:
        if name in plan.edits:
            yield from _copies(file, start, first)
            yield Unit(f"{file.target} {first}", file, first, last, name)
            start = last
        end = last
    yield from _copies(file, start, max(start, end))


def _copies(file: File, start: int, end: int) -> Iterator[Unit]:
    for first in range(start, end, COPY_BYTES):
        yield Unit(f"{file.target} {first}", file, first, min(first + COPY_BYTES, end))


def _run(base: Base, plan: Plan, units: Sequence[Unit], folder: Path) -> None:
    threads = max(1, torch.get_num_threads())
    lock, local = threading.Lock(), threading.local()
    with TileReads() as reads, (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        outputs = {u.file.target: os.open(u.file.target, os.O_RDWR) for u in units}
        try:
            with bytes_bar(sum(u.end - u.start for u in units), "applying") as advance:

                def work(unit: Unit) -> None:
                    if not hasattr(local, "scratch"):
                        local.scratch = Scratch()
                    target = outputs[unit.file.target]
                    if unit.name:
                        tensor, shape = base.tensors[unit.name], plan.shapes[unit.name]
                        _change(reads, tensor, shape, plan.edits[unit.name], target, unit.file.shift, local.scratch)
                    else:
                        _copy(reads, unit.file.source, unit.start, unit.end, target, unit.file.shift)
                    with lock:
                        journal.write(unit.key + "\n")
                        journal.flush()
                        advance(unit.end - unit.start)

                with ThreadPoolExecutor(threads) as pool:
                    pending = [pool.submit(work, unit) for unit in units]
                    try:
                        for future in pending:
                            future.result()
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
        finally:
            for descriptor in outputs.values():
                os.close(descriptor)


def _change(
    reads: TileReads, tensor: StoredTensor, shape: tuple[int, int], edits: Sequence[Edit], target: int, shift: int,
    scratch: Scratch,
) -> None:  # fmt: skip
    """One tensor, tile by tile: rows are read, changed, and written to their place."""
    rows, columns = shape
    assert tensor.file is not None and tensor.dtype is not None
    row_bytes = columns * tensor.dtype.itemsize
    tall = max(1, TILE_BYTES // max(1, row_bytes))
    source = reads.descriptor(tensor.file)

    def tile(row: int, end: int) -> Tensor:
        reads.read(tensor.file, tensor.offset + row * row_bytes, scratch.bytes((end - row) * row_bytes))  # type: ignore[arg-type]
        return scratch.tensor(tensor.dtype, (end - row, columns))  # type: ignore[arg-type]

    measured = [e for e in edits if e.is_measured]
    for edit in measured:
        for row in range(edit.at, edit.at + edit.height, tall):
            end = min(row + tall, edit.at + edit.height)
            wide = _wide(tile(row, end), [edit])[:, edit.left : edit.left + edit.width]
            edit.measure(wide.contiguous(), row - edit.at)
    for first, last, changes in blocks(edits, rows):
        if not changes:
            start, end = tensor.offset + first * row_bytes, tensor.offset + last * row_bytes
            _copy(reads, tensor.file, start, end, target, shift)
            continue
        low_rank = [e for e in changes if isinstance(e, LowRank)]
        if len(low_rank) == len(changes):
            task = products(low_rank, first, last, columns, (tensor.dtype, tensor.dtype))
            start = tensor.offset + first * row_bytes
            problem = add_products(task, FilePlace(source, start), FilePlace(target, start + shift))
            if problem is not None:
                raise _error(problem, tensor)
            continue
        for row in range(first, last, tall):
            end = min(row + tall, last)
            changed = _changed(tile(row, end), row, changes, tensor)
            _put(target, changed, tensor.offset + row * row_bytes + shift)


def _wide(tile: Tensor, edits: Sequence[Edit]) -> Tensor:
    double = tile.dtype.itemsize > 2 or any(e.is_wide for e in edits)
    return tile.to(torch.float64 if double else torch.float32)


def _changed(tile: Tensor, row: int, edits: Sequence[Edit], tensor: StoredTensor) -> Tensor:
    """The rows of a tile with their changes, rounded once."""
    wide = _wide(tile, edits)
    total = wide.clone()
    for edit in edits:
        part = wide[:, edit.left : edit.left + edit.width]
        place = total[:, edit.left : edit.left + edit.width]
        if len(edits) == 1:
            place.copy_(edit.alone(part.contiguous(), row - edit.at))
        else:
            place += edit.change(part.contiguous(), row - edit.at)
    changed = total.to(tile.dtype)
    if not bool(changed.isfinite().all()):
        raise _error(ProductProblem("not finite"), tensor)
    return changed


def _error(problem: ProductProblem, tensor: StoredTensor) -> Exception:
    """What stopped the change of a tensor, told as it is everywhere."""
    if problem.what == "write":
        return OSError(problem.errno, os.strerror(problem.errno))
    if problem.what == "read":
        return InputError(f"{tensor.file} cannot be read ({os.strerror(problem.errno)}); check the disk")
    if problem.what == "short":
        return InputError(f"{tensor.file} is shorter than its header says; it was changed or cut off: copy it again")
    if tensor.dtype == torch.float16:
        return OutputError(
            f"{tensor.name} would leave the range of float16; apply to the model in bfloat16 or float32, or with "
            "smaller weights"
        )
    return OutputError(
        f"{tensor.name} would hold NaN or infinity: the model does, or weights are too large; look at it with "
        "`fastlora inspect`, or apply with smaller weights"
    )


def _put(target: int, tile: Tensor, offset: int) -> None:
    view = memoryview(tile.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(view):
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count


def _copy(reads: TileReads, source: Path, start: int, end: int, target: int, shift: int) -> None:
    """Bytes ``[start, end)``, by the system where it can."""
    descriptor = reads.descriptor(source)
    while start < end:
        try:
            count = os.copy_file_range(descriptor, target, end - start, start, start + shift)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            count = 0
        if not count:
            data = os.pread(descriptor, min(end - start, TILE_BYTES), start)
            if not data:
                raise InputError(f"{source} is shorter than its header says; copy it again")
            count = os.pwrite(target, data, start + shift)
        start += count


def _finish(base: Base, files: Sequence[File], folder: Path, out: Path) -> None:
    """Other files are copied, the parts get their names, and the folder its place."""
    ours = {file.source for file in files}
    (folder / JOURNAL).unlink()
    for file in files:
        os.replace(file.target, file.target.with_name(file.target.name.removesuffix(PART)))
    if not base.is_folder:
        os.replace(folder / out.name, out)
        folder.rmdir()
        return
    for path in sorted(base.root.rglob("*")):
        if path.is_file() and path.resolve() not in ours and path not in ours:
            place = folder / path.relative_to(base.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    os.rename(folder, out)
