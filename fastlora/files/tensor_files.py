"""Tensor files: read where they lie, written in place."""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.errors import InputError, OutputError
from fastlora.files.json_files import is_plain, parse_object, require_file, shown
from fastlora.files.output import finished, output_error, writing
from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import CombineJob, CombineOutput


def cast_tensor(tensor: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    """The tensor in ``dtype``, on the CPU and contiguous: itself when it is that already.

    Raises :class:`OutputError` when a value is beyond the range of ``dtype``.
    """
    if tensor.is_meta:
        return tensor if tensor.dtype == dtype else tensor.to(dtype)
    result = tensor.detach().to("cpu", dtype).contiguous()
    if tensor.dtype != dtype and not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        problem = (
            f"has values up to {largest:.3g}, beyond the largest {str(dtype)[6:]} "
            f"({torch.finfo(dtype).max:.3g}); save with dtype=float32"
            if math.isfinite(largest)
            else "has values that are not finite; look for NaN in the inputs"
        )
        raise OutputError(f"module {module!r} {problem}")
    return result


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
ALIGNMENT = 4096  # of the first tensor: whole pages are written faster, and tensors mostly are whole pages

LARGEST_HEADER = 100_000_000
"""Bytes: the limit of safetensors."""
LONGEST_NAME = 1000
"""Characters of a tensor's name."""
MOST_KNOWN, LARGEST_KNOWN = 8, 2**20
"""How many headers are remembered, and of how many bytes."""
MOST_VIEWS = 4
"""How often the bytes of a file may be used: tied tensors share theirs."""

CALLS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""What a pickle of tensors names."""
LEGACY_PICKLES = 5
"""A file older than torch 1.6: magic number, version, system, tensors, keys; then the data."""

LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies behind the header. ``dtype`` is ``None`` where a view is not simple to make: of an unusual
    dtype, or of no bytes."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int


_known: OrderedDict[tuple[bytes, int], dict[str, _Place]] = OrderedDict()
"""Headers that were checked last: those of adapters from one training recipe are the same to the byte."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as a view of a private mapping that lives as long as the tensor.

    The library checks the file; the views are made here, several times faster than it makes them, and there are
    thousands in a pool. Nothing is copied, so addresses can be odd: they are where the file put the tensors.
    """
    _refuse_pointer(path)
    header, size = _read_header(path)
    try:
        places = _known.get((header, size)) or _places(path, header, size)
        with path.open("rb") as raw:
            mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        views = _Views(mapping, 8 + len(header))
        tensors = {name: views.of(place) for name, place in places.items() if place.dtype is not None}
        if len(tensors) < len(places):
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: tensors[name] if name in tensors else file.get_tensor(name) for name in places}
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        OverflowError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({_first_line(error)}); it may be cut off: "
            "copy or download it again"
        ) from None
    if len(header) <= LARGEST_KNOWN:
        _known[header, size] = places
        _known.move_to_end((header, size))
        while len(_known) > MOST_KNOWN:
            _known.popitem(last=False)
    return tensors


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header, and the size of the file."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        size = os.fstat(file.fileno()).st_size
        if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(
                f"{path} is no readable safetensors file (its header should have {length} bytes of {size}); "
                "it may be cut off: copy or download it again"
            )
        return file.read(length), size


def _places(path: Path, raw: bytes, size: int) -> dict[str, _Place]:
    """Where the tensors are, by name, in the order of the library, which checks offsets and sizes. Refuses what it
    accepts or has no name for: tensors named twice, names and shapes that nothing can use."""
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
        return {name: _place(header[name]) for name in file.keys()}


def _place(entry: Mapping[str, Any]) -> _Place:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return _Place(NAMED_DTYPES.get(entry["dtype"]) if first < last else None, shape, tuple(strides), first)


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > 64:
        return False
    for n in shape:
        if type(n) is not int or not 0 <= n < 1 << 48:
            return False
    return True


class _Views:
    """Tensors in a mapped file, as views of one tensor for each dtype and remainder of the offset."""

    def __init__(self, mapping: mmap.mmap, start: int) -> None:
        self._mapping = mapping
        self._start = start
        self._whole: dict[tuple[torch.dtype, int], Tensor] = {}

    def of(self, place: _Place) -> Tensor:
        dtype = cast(torch.dtype, place.dtype)
        index, rest = divmod(self._start + place.first, dtype.itemsize)
        whole = self._whole.get((dtype, rest))
        if whole is None:
            count = (len(self._mapping) - rest) // dtype.itemsize
            whole = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=rest)
            self._whole[dtype, rest] = whole
        return whole.as_strided(place.shape, place.strides, index)


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order, each at its place.

    The safetensors library writes a file from tensors that are all in memory; this one is given their shapes first
    (``outlines``: tensors, on the meta device or not) and keeps nothing.
    """

    def __init__(self, path: Path, outlines: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name in sorted(sorted(outlines), key=lambda n: -outlines[n].dtype.itemsize):
            tensor = outlines[name]
            end = offset + tensor.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            self._places[name] = offset, end
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._start = 8 + len(text)
        self._missing = set(outlines)
        with writing(path), path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _make_room(file.fileno(), self._start + offset)

    def write(self, tensors: Mapping[str, Tensor], *, check: bool = False) -> None:
        """Writes some tensors, which have the shapes and dtypes that were announced; ``check`` refuses NaN and Inf."""
        names = [n for n, t in tensors.items() if t.nbytes]
        for name, tensor in tensors.items():
            start, end = self._places[name]
            if tensor.nbytes != end - start:
                raise ValueError(f"{name}: {tensor.nbytes} bytes where {end - start} were announced")
        if not names:
            self.written(tensors)
            return
        with self.open() as file:
            outputs = [CombineOutput.copy(_as_row(tensors[n]), file, self.offset(n), check) for n in names]
            jobs = [CombineJob([], outputs, False)]
            problem = resolve("combine_pass", jobs).launch(jobs)
        if problem is not None:
            name = names[problem.output]
            raise self.error(name, tensors[name].dtype, problem.errno)
        self.written(tensors)

    def offset(self, name: str) -> int:
        """Where in the file a tensor starts."""
        return self._start + self._places[name][0]

    @contextmanager
    def open(self) -> Iterator[int]:
        """The file's descriptor; it is open only meanwhile."""
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            yield file.fileno()

    def written(self, names: Iterable[str]) -> None:
        """Notes that tensors were written to their places through :meth:`open`."""
        self._missing.difference_update(names)

    def error(self, name: str, dtype: torch.dtype, errno: int | None) -> OutputError:
        """The error of a tensor that was not written: it holds NaN or Inf, or the system's ``errno``."""
        if errno is not None:
            return output_error(OSError(errno, os.strerror(errno)), self.path)
        return OutputError(
            f"{finished(self.path)}: {name} does not fit {str(dtype)[6:]} "
            "(NaN or Inf after rounding); save with dtype=float32 (`--dtype float32`), "
            "or look at the inputs with `fastlora inspect`"
        )

    def close(self) -> None:
        """Checks that every tensor was written."""
        if self._missing:
            raise ValueError(f"{self.path}: {min(self._missing)} was announced and not written")


def _make_room(file: int, size: int) -> None:
    """A full disk is found out before anything is computed, and writing where there is room is faster."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # not of this system, or not of this file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.truncate(file, size)


def _as_row(tensor: Tensor) -> Tensor:
    """The tensor's values as one row; of a dtype that is only copied, as bytes."""
    flat = tensor.contiguous().reshape(1, -1)
    return flat if flat.dtype.is_floating_point else flat.view(torch.uint8)


def read_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file written by ``torch.save``; only tensors and plain containers are unpickled."""
    _refuse_pointer(path)
    size = path.stat().st_size
    # Only mapped storages are held against the size of the file. Files older than torch 1.6 are no zip archives and
    # cannot be mapped.
    mapped = _is_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # What a damaged pickle raises has no common class: unpickling runs operations with arguments from the file.
        raise _unreadable(path, error) from None
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()
    ):
        raise InputError(f"{path} holds no mapping from names to tensors; save the adapter again as safetensors")
    total = 0
    for key, value in values.items():
        if not is_plain(key) or len(key) > LONGEST_NAME:
            raise InputError(
                f"{path}: tensor {key[:60]!r} has control characters in its name, or is too long; rename it"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InputError(f"{path}: tensor {key!r} is no plain tensor; save the adapter again as safetensors")
        total += value.nbytes
        if value.nbytes > value.untyped_storage().nbytes() or total > MOST_VIEWS * size:
            raise InputError(
                f"{path}: tensor {key!r} is {list(value.shape)}, more than the file holds; "
                "save the adapter again as safetensors"
            )
    return {key: value.detach() for key, value in values.items()}


def _is_archive(path: Path) -> bool:
    """Whether a file of tensors is a zip archive, as all but the oldest are. Refuses what only a hostile one holds:
    entries that grow when unpacked, and calls of anything but what makes tensors."""
    size = path.stat().st_size
    try:
        archived = zipfile.is_zipfile(path)
        if not archived:
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    _check_calls(path, file)
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(e.file_size for e in entries) > size or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise InputError(
                    f"{path} is compressed, which torch.save never does; save the adapter again as safetensors"
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    _check_calls(path, io.BytesIO(archive.read(entry)))
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    return True


def _check_calls(path: Path, file: IO[bytes]) -> None:
    """Refuses a pickle that names anything but tensors: what torch allows beside them can take any memory."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "STACK_GLOBAL" or (
            operation.name in ("GLOBAL", "INST") and not CALLS.fullmatch(str(argument))
        ):
            raise InputError(
                f"{path} calls {str(argument)[:80]!r}, which makes no tensor; "
                "have the adapter saved again as safetensors"
            )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is no readable file of tensors ({_first_line(error)}); "
        "save the adapter again as safetensors, or download it again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _refuse_pointer(path: Path) -> None:
    require_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if start == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` beside it")
