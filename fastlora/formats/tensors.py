"""Tensor files: read where they lie, written in place."""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.backends import resolve
from fastlora.errors import InputError, OutputError
from fastlora.output import writing

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
ALIGNMENT = 64  # of the first tensor: SIMD loads of aligned rows stay within cache lines

LFS_POINTER = b"version https://git-lfs"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as a view of a private mapping that lives as long as the tensor.

    The library checks the file; the views are made here, several times faster than it makes them, and there are
    thousands in a pool. Nothing is copied, so addresses can be odd: they are where the file put the tensors.
    """
    _refuse_pointer(path)
    try:
        with path.open("rb") as raw:
            mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapping[:8], "little")
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads(mapping[8:start])
            return {
                name: _view(mapping, start, header[name]) if _is_plain(header[name]) else file.get_tensor(name)
                for name in file.keys()
            }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}); it may be cut off: copy or download it again"
        ) from None


def _is_plain(entry: Mapping[str, Any]) -> bool:
    """Whether a view is simple to make: a usual dtype, and something to view."""
    first, last = entry["data_offsets"]
    return entry["dtype"] in NAMED_DTYPES and first < last


def _view(mapping: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype = NAMED_DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start + first).view(entry["shape"])


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
        for name in sorted(outlines, key=lambda n: (-outlines[n].element_size(), n)):
            tensor = outlines[name]
            end = offset + tensor.numel() * tensor.element_size()
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
            file.truncate(self._start + offset)

    def write(self, tensors: Mapping[str, Tensor], *, check: bool = False) -> None:
        """Writes some tensors, which have the shapes and dtypes that were announced; ``check`` refuses NaN and Inf.

        The file is open only meanwhile: a decomposition of many pairs has more files than a process may hold open.
        """
        names = [n for n, t in tensors.items() if t.nbytes]
        for name, tensor in tensors.items():
            start, end = self._places[name]
            if tensor.nbytes != end - start:
                raise ValueError(f"{name}: {tensor.nbytes} bytes where {end - start} were announced")
        flat = [tensors[n].contiguous() for n in names]
        offsets = [self._start + self._places[n][0] for n in names]
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            bad = resolve("write", file.fileno(), flat, offsets, check).launch(file.fileno(), flat, offsets, check)
        if bad is not None:
            raise OutputError(
                f"{names[bad]} does not fit {str(flat[bad].dtype)[6:]} (NaN or Inf after rounding); save with "
                "dtype=float32 (`--dtype float32`), or look at the inputs with `fastlora inspect`"
            )
        self._missing -= tensors.keys()

    def close(self) -> None:
        """Checks that every tensor was written."""
        if self._missing:
            raise ValueError(f"{self.path}: {min(self._missing)} was announced and not written")


def read_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file written by ``torch.save``; only tensors and plain containers are unpickled."""
    _refuse_pointer(path)
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} is no readable file of tensors ({_first_line(error)}); "
            "save the adapter again as safetensors, or download it again"
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()
    ):
        raise InputError(f"{path} holds no mapping from names to tensors; save the adapter again as safetensors")
    return {key: value.detach() for key, value in values.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if start == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` beside it")
