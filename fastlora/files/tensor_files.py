"""Safetensors files, read where they lie."""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.errors import InputError
from fastlora.files.json_files import is_plain, parse_object, require_file, shown
from fastlora.files.mapped_tensors import MappedFile, Place, Views
from fastlora.runtime import system

SAFETENSORS = ".safetensors"
"""The suffix of such files."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
RARE_DTYPES = {
    name: dtype
    for name, attribute in (
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E8M0", "float8_e8m0fnu"),
        ("U16", "uint16"),
        ("U32", "uint32"),
        ("U64", "uint64"),
        ("C64", "complex64"),
    )
    if isinstance(dtype := getattr(torch, attribute, None), torch.dtype)
}
"""Dtypes that files of whole models may have beside these."""
LARGEST_HEADER = 100_000_000
"""Bytes: the limit of safetensors."""
LONGEST_NAME = 1000
"""Characters of a tensor's name."""
MOST_KNOWN, LARGEST_KNOWN = 8, 2**20
"""How many headers are remembered, and of how many bytes."""
UNREADABLE = (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, RuntimeError, MemoryError)
"""What damaged files raise."""
LFS_POINTER = b"version https://git-lfs"
AT_ONCE = 2**13
"""Bytes of a file that are read first: the headers of small adapters are smaller."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``size`` bytes from ``offset`` on in ``file``, its rows one after another (C order).

    ``name``: that in the file. ``code``: the name of its dtype in safetensors; ``dtype``: torch's, ``None`` where it
    has none. ``view``: the tensor itself where it does not lie in a safetensors file (``.bin``, a state dict);
    ``offset`` means nothing then.
    """

    name: str
    file: Path | None
    offset: int
    size: int
    shape: tuple[int, ...]
    code: str
    dtype: torch.dtype | None
    view: Tensor | None = None

    @property
    def row_size(self) -> int:
        """Bytes of one row, ``[1, …]``."""
        return self.size // self.shape[0] if self.shape and self.shape[0] else self.size


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself: ``{tensor: shape}`` in the order of the library, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


_known: OrderedDict[tuple[bytes, int], tuple[dict[str, Place], dict[str, str]]] = OrderedDict()
"""Headers that were checked last, and the bytes behind them: adapters from one training recipe have the same, but for
the metadata, which come first and are left out here."""
_knowing = threading.Lock()
"""Of threads that read at once: between two steps of one, another may drop what it just added."""
METADATA = re.compile(rb'\{"__metadata__":(?=\{)')
"""How a header begins that has metadata, as the library writes it."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as a view of a private mapping that lives as long as the tensor.

    The library checks the file; the views are made here, in a tenth of the time that its ``safe_open`` takes: a pool of
    eight adapters of a 7B model is loaded, decomposed and saved in 93 % of the processor time. Nothing is copied, so
    addresses can be odd: they are where the file put the tensors.
    """
    mapped = map_safetensors(path)
    tensor_places = mapped.places
    try:
        views = Views(mapped.mapping, mapped.start)
        tensors = {name: views.of(place) for name, place in tensor_places.items() if place.dtype is not None}
        if len(tensors) < len(tensor_places):
            with safe_open(path, framework="pt", device="cpu") as opened:
                tensors = {
                    name: tensors[name] if name in tensors else opened.get_tensor(name) for name in tensor_places
                }
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    return tensors


def map_safetensors(path: Path | str, *, is_file: bool = False) -> MappedFile:
    """Checks a safetensors file and maps it. ``is_file``: the caller knows it for a regular file."""
    file = _opened(path, is_file)
    try:
        places, start, _, head = _checked(path, file)
        return MappedFile(places, start, _mapped(path, file), head)
    finally:
        os.close(file)


def read_header(path: Path) -> Header:
    """The names and shapes of the tensors in a safetensors file, and its metadata; no tensor is read."""
    places, _, metadata, _ = _read(path)
    return Header({name: place.shape for name, place in places.items()}, metadata)


def read_places(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie, in the order of the file; no tensor is read."""
    places, start, _, _ = _read(path)
    found = {
        name: StoredTensor(
            name,
            path,
            start + place.first,
            place.last - place.first,
            place.shape,
            place.code,
            NAMED_DTYPES.get(place.code, RARE_DTYPES.get(place.code)),
        )
        for name, place in places.items()
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].size)))


Checked = tuple[dict[str, Place], int, dict[str, str], bytes]


def _read(path: Path) -> Checked:
    file = _opened(path)
    try:
        return _checked(path, file)
    finally:
        os.close(file)


def _checked(path: Path | str, file: int) -> Checked:
    """Where the tensors are, where the first of them may lie, the metadata, and the bytes that were read of them, of a
    file whose header is sound."""
    head, start, size = _read_header(path, file)
    header = head[8:start]
    own, rest = _apart(header)
    known = _known.get((rest, size - start))
    if known is None:
        try:
            known = _places(path, header, size)
        except UNREADABLE as error:
            raise _unreadable(path, error) from None
    if len(header) <= LARGEST_KNOWN:
        with _knowing:
            _known[rest, size - start] = known
            _known.move_to_end((rest, size - start))
            while len(_known) > MOST_KNOWN:
                _known.popitem(last=False)
    return known[0], start, known[1] if own is None else own, head


def _mapped(path: Path | str, file: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _apart(header: bytes) -> tuple[dict[str, str] | None, bytes]:
    """The metadata with which a header begins, and what follows them; ``None`` and all of it where it begins in another
    way, or where the metadata are not such as are written."""
    begins = METADATA.match(header)
    if begins is None or len(header) > LARGEST_KNOWN:
        return None, header
    try:
        text = header[begins.end() :].decode()
        found, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # told of the whole header
        return None, header
    values = dict(found)
    if len(values) < len(found) or not all(type(v) is str for v in values.values()):
        return None, header
    return values, text[end:].encode()


_DECODER = json.JSONDecoder(object_pairs_hook=list)


def _unreadable(path: Path | str, error: Exception) -> InputError:
    return InputError(
        f"{path} is no readable safetensors file ({first_line(error)}); it may be cut off: copy or download it again"
    )


def _opened(path: Path | str, is_file: bool = False) -> int:
    """A descriptor of a file; refuses what is none and what cannot be read."""
    if not is_file:
        require_file(Path(path))
    try:
        return system.open_to_read(path)
    except OSError as error:
        raise _closed(path, error) from None


def _read_header(path: Path | str, file: int) -> tuple[bytes, int, int]:
    """What a file begins with, where its header ends in that, and the size of the file; refuses what stands for a file
    that was not fetched."""
    try:
        raw = os.read(file, AT_ONCE)
        length, size = int.from_bytes(raw[:8], "little"), os.fstat(file).st_size
        if raw.startswith(LFS_POINTER):
            raise _pointer(path)
        if len(raw) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(
                f"{path} is no readable safetensors file (its header should have {length} bytes of {size}); "
                "it may be cut off: copy or download it again"
            )
        pieces = [raw]
        missing = 8 + length - len(raw)
        while missing > 0 and pieces[-1]:
            pieces.append(os.read(file, missing))
            missing -= len(pieces[-1])
    except OSError as error:
        raise _closed(path, error) from None
    head = raw if len(pieces) == 1 else b"".join(pieces)
    return head, min(8 + length, len(head)), size


def _places(path: Path | str, raw: bytes, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors are, by name, in the order of the library, which checks offsets and sizes; and the metadata.
    Refuses what it accepts or has no name for: tensors named twice, names and shapes that nothing can use."""
    header = parse_object(raw, f"{path} is no readable safetensors file: its header")
    room = size - 8 - len(raw)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not is_plain(name):
            raise InputError(f"{path}: tensor {name[:300]!r} has control characters in its name; rename it")
        if len(name) > LONGEST_NAME:
            raise InputError(f"{path}: tensor {name[:60]!r}… has a name of {len(name)} characters; rename it")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not _is_shape(shape):
            raise InputError(f"{path}: tensor {name!r} has the shape {shown(shape)}; copy or download the file again")
        offsets = entry.get("data_offsets")
        if type(offsets) is not list or [type(n) for n in offsets] != [int, int]:
            raise InputError(
                f"{path}: tensor {name!r} has the offsets {shown(offsets)}; copy or download the file again"
            )
        if not 0 <= offsets[0] <= offsets[1] <= room:
            raise InputError(
                f"{path} is no readable safetensors file (tensor {name!r} lies at {shown(offsets)}, but there are "
                f"{room} bytes of tensors); it may be cut off: copy or download it again"
            )
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: _place(header[name]) for name in file.keys()}, dict(file.metadata() or {})


def _place(entry: Mapping[str, Any]) -> Place:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    dtype = NAMED_DTYPES.get(entry["dtype"]) if first < last else None
    return Place(dtype, shape, tuple(strides), first, last, entry["dtype"])


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > 64:
        return False
    for n in shape:
        if type(n) is not int or not 0 <= n < 1 << 48:
            return False
    return True


def first_line(error: Exception) -> str:
    """What an error of a library says, short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def refuse_pointer(path: Path) -> None:
    """Refuses what is no file, cannot be read, or stands for a file that was not fetched."""
    file = _opened(path)
    try:
        start = os.read(file, len(LFS_POINTER))
    except OSError as error:
        raise _closed(path, error) from None
    finally:
        os.close(file)
    if start == LFS_POINTER:
        raise _pointer(path)


def _closed(path: Path | str, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions")


def _pointer(path: Path | str) -> InputError:
    return InputError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` beside it")
