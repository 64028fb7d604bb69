"""Where everything will be in the files of a model that is written again: known before any number is computed.

A file has the tensors of its source in their order, of the same shapes. Those that are stored otherwise (``dtype``)
move the ones behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlora.checkpoints.base import Base, matrix_shape
from fastlora.errors import InputError
from fastlora.files.tensor_files import DTYPE_NAMES, StoredTensor, read_header, read_places
from fastlora.files.tensor_writing import header_of

COPY_BYTES = 32 * 2**20
PART_BYTES = 64 * 2**20  # of a tensor that changes, rows that are one unit


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlace:
    """A tensor under its name in the model; where it will be in the file, from the start, and its dtype there.

    ``dtype`` is ``None`` for codes and whole numbers, which are copied.
    """

    name: str
    stored: StoredTensor
    offset: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True, eq=False)
class OutputFile:
    """A file of tensors: its source, its path in the output, how it begins, its size, and its tensors in order."""

    source: Path
    path: Path
    header: bytes
    size: int
    places: Sequence[TensorPlace]


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What is done at once, and depends on no other: rows ``[first, last)`` of a tensor that changes, a matrix of this
    ``shape``, or bytes ``[first, last)`` of the source, copied to ``offset``.

    ``key``: the same in every run. ``size``: bytes of the source."""

    key: str
    file: OutputFile
    first: int
    last: int
    offset: int
    place: TensorPlace | None = None
    shape: tuple[int, int] = (0, 0)
    size: int = 0


def output_files(base: Base, out: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> list[OutputFile]:
    """The files of a model with all their tensors, also those that its index does not name; ``metadata`` is put beside
    what they say of themselves."""
    names = {(tensor.file, tensor.name): name for name, tensor in base.tensors.items()}
    return [_output_file(base, source, names, out, dtype, metadata) for source in base.files()]


def _output_file(
    base: Base,
    source: Path,
    names: Mapping[tuple[Path | None, str], str],
    out: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> OutputFile:
    entries: dict[str, object] = {}
    placed: list[tuple[str, StoredTensor, int, torch.dtype | None]] = []
    at = 0
    for tensor in read_places(source).values():  # in the order of the file
        kept, code, size = _stored_as(tensor, dtype)
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        placed.append((names.get((source, tensor.name), ""), tensor, at, kept))
        at += size
    header = header_of(entries, {**read_header(source).metadata, **metadata})
    start = len(header)
    places = [TensorPlace(name, tensor, start + place, kept) for name, tensor, place, kept in placed]
    relative = source.relative_to(base.root) if base.is_folder else Path(out.name)
    return OutputFile(source, relative, header, start + at, places)


def _stored_as(tensor: StoredTensor, dtype: torch.dtype | None) -> tuple[torch.dtype | None, str, int]:
    """The dtype of a tensor in the output, its name there, and its bytes."""
    own = tensor.dtype
    if own is None or not own.is_floating_point or own.itemsize == 1:
        return None, tensor.code, tensor.size
    if dtype is None or dtype == own:
        return own, tensor.code, tensor.size
    return dtype, DTYPE_NAMES[dtype], tensor.size // own.itemsize * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Change:
    """Rows and columns of a tensor that changes, as a matrix; ``apart``: whether rows can be done one by one."""

    shape: tuple[int, int]
    apart: bool = True


def units(files: Iterable[OutputFile], changes: Mapping[str, Change]) -> Iterator[Unit]:
    """What there is to do, in the order of the files. What does not change is copied, in long stretches."""
    for file in files:
        waiting: list[tuple[int, int, int]] = []  # first, last, offset of what is copied
        for place in file.places:
            tensor = place.stored
            change = changes.get(place.name)
            if change is None and place.dtype is not None and place.dtype != tensor.dtype:
                change = Change(matrix_shape(tensor) if len(tensor.shape) > 1 else (1, math.prod(tensor.shape)))
            if change is not None:
                yield from _copies(file, waiting)
                waiting = []
                yield from _rows(file, place, change)
                continue
            first, last, offset = waiting[-1] if waiting else (-1, -1, 0)
            if (last, offset + last - first) == (tensor.offset, place.offset):
                waiting[-1] = first, tensor.offset + tensor.size, offset
            else:
                waiting.append((tensor.offset, tensor.offset + tensor.size, place.offset))
        yield from _copies(file, waiting)


def _copies(file: OutputFile, stretches: Iterable[tuple[int, int, int]]) -> Iterator[Unit]:
    for first, last, offset in stretches:
        for start in range(first, last, COPY_BYTES):
            end = min(start + COPY_BYTES, last)
            yield Unit(f"{file.path} {start}", file, start, end, offset + start - first, size=end - start)


def _rows(file: OutputFile, place: TensorPlace, change: Change) -> Iterator[Unit]:
    rows, columns = change.shape
    row = columns * (1 if place.stored.dtype is None else place.stored.dtype.itemsize)
    step = max(1, PART_BYTES // max(1, row)) if change.apart else max(1, rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        key = f"{file.path} {place.stored.offset} {first}"
        yield Unit(key, file, first, last, place.offset, place, change.shape, (last - first) * row)


def check_dtype(base: Base, dtype: torch.dtype | None) -> None:
    """Refuses another dtype for tensors that are codes."""
    if dtype is None:
        return
    for name in base.tensors:
        refusal = base.refusal(name)
        if refusal is not None:
            raise InputError(f"{base.root} is quantised ({refusal}): {name} holds codes, which have no other dtype")
