"""Safetensors files, written in place: tensors one by one, in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import OutputError
from fastlora.files import spare
from fastlora.files.disk_errors import finished, output_error
from fastlora.files.small_files import NEW, open_file, write_all
from fastlora.files.tensor_files import DTYPE_NAMES
from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import CombineJob, CombineOutput
from fastlora.runtime import joint_outputs, ranks
from fastlora.runtime.system import make_room, write_all_at

SMALL_BYTES = 2**20  # room for fewer takes longer to make than to write, and a full disk is found out as soon
ALIGNMENT = 4096  # of the first tensor: whole pages are written faster, and tensors mostly are whole pages


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


_as_json = json.JSONEncoder(separators=(",", ":")).encode


def header_of(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """How a file of these tensors begins, to the first of them: whole pages. ``entries``: what is said of each."""
    return header_around(_as_json(entries), metadata)


def header_around(entries: str, metadata: Mapping[str, str]) -> bytes:
    """As :func:`header_of`, of ``entries`` as JSON."""
    told = _as_json({"__metadata__": dict(metadata)})
    text = (told if entries == "{}" else f"{told[:-1]},{entries[1:]}").encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def make_file(path: Path, start: bytes, size: int, *, with_room: bool = True) -> None:
    """Makes a file of its full size, with the room that it takes on the disk, and writes how it begins.

    A full disk is found out before anything is computed, and writing where there is room is faster.
    """
    with open_file(path, NEW) as file:
        write_all(file, start)
        if with_room:
            make_room(file, size)
        else:
            os.ftruncate(file, size)


class TensorPlaces:
    """Where tensors lie in a file, by their shapes.

    ``places``: the first byte of each and the one behind it, from the start of the first tensor; ``size``: of all.
    ``entries``: what the header says of each, and ``text``, as JSON.
    """

    def __init__(self, outlines: Mapping[str, Tensor]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.entries: dict[str, object] = {}
        self.size = 0
        for name in sorted(sorted(outlines), key=lambda n: -outlines[n].dtype.itemsize):
            tensor = outlines[name]
            place = self.size, self.size + tensor.nbytes
            self.entries[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": list(place),
            }
            self.places[name] = place
            self.size = place[1]
        self.text = _as_json(self.entries)


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order, each at its place.

    The safetensors library writes a file from tensors that are all in memory; this one is given their shapes first
    (``outlines``: tensors, on the meta device or not; or the ``tensors`` of a file that has the same) and keeps
    nothing. ``start``: where the first tensor begins.

    Inside :func:`fastlora.files.spare.offered` it may be a file that was made before, and is written to as memory.
    Inside :func:`fastlora.runtime.ranks.one_file` all ranks write one file: the first makes it, and the others open it
    where it is.
    """

    def __init__(self, path: Path, outlines: Mapping[str, Tensor] | TensorPlaces, metadata: Mapping[str, str]) -> None:
        shared = ranks.is_one_file()
        self.tensors = tensors = outlines if isinstance(outlines, TensorPlaces) else TensorPlaces(outlines)
        self.path = path = joint_outputs.place(path) if shared else path
        text = header_around(tensors.text, metadata)
        self.start = len(text)
        self._places = tensors.places
        self._missing = set(tensors.places)
        self._mapped = None if shared else _from_spare(path, text, self.start + tensors.size)
        if self._mapped is not None:
            return
        if not shared or joint_outputs.is_made_here():
            size = self.start + tensors.size
            is_part = shared and joint_outputs.is_apart()  # a part of this file is all that will be in it
            make_file(path, text, size, with_room=size >= SMALL_BYTES and not is_part)

    def restate(self, metadata: Mapping[str, str]) -> None:
        """Writes the header again, with other metadata of the same length."""
        text = header_around(self.tensors.text, metadata)
        if len(text) != self.start:
            raise ValueError(f"{self.path}: a header of {len(text)} bytes where {self.start} were announced")
        with self.open() as file:
            write_all_at(file, memoryview(text), 0)

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
        return self.start + self._places[name][0]

    @contextmanager
    def open(self) -> Iterator[int]:
        """The file's descriptor, which is open only meanwhile, or the address where the file is mapped."""
        if self._mapped is not None:
            yield self._mapped
            return
        with open_file(self.path) as file:
            yield file

    def written(self, names: Iterable[str]) -> None:
        """Notes that tensors were written to their places through :meth:`open`."""
        self._missing.difference_update(names)

    def sent(self, names: Iterable[str]) -> None:
        """Brings tensors that this rank wrote to the file of the first rank, where it has one of its own; all ranks
        call it."""
        places = [self._places[n] for n in sorted(names)]
        joint_outputs.sent(self.path, [(self.start + first, last - first) for first, last in places])

    def missing(self) -> set[str]:
        """The names of tensors that were announced and not written yet."""
        return set(self._missing)

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


def _from_spare(path: Path, start: bytes, size: int) -> int | None:
    """Where a file is mapped that was made before and begins with ``start`` now; ``None`` without such a file."""
    ready = spare.current()
    address = None if ready is None else ready.take(path, size)
    if address is not None:
        write_all_at(address, memoryview(start), 0)
    return address


class InOneFile:
    """What writers have in common whose tensors are all in one file: factors of ``dtype``, written at their places."""

    dtype: torch.dtype
    _file: TensorFile

    def open(self) -> AbstractContextManager[int]:
        """The descriptor of the file, open for writing factors at their places; or where it is mapped whole, an address
        above :data:`fastlora.runtime.system.LARGEST_DESCRIPTOR`."""
        return self._file.open()

    def written(self, names: Iterable[str]) -> None:
        """Notes that factors were written at their places."""
        self._file.written(names)

    def missing(self) -> set[str]:
        """The names of tensors that were announced and not written yet."""
        return self._file.missing()

    def sent(self, names: Iterable[str]) -> None:
        """Brings factors that this rank wrote to the file of the first, where it has one of its own."""
        self._file.sent(names)

    def error(self, name: str, errno: int | None) -> OutputError:
        """The error of a factor that could not be written: it holds NaN or Inf, or the system's ``errno``."""
        return self._file.error(name, self.dtype, errno)


def _as_row(tensor: Tensor) -> Tensor:
    """The tensor's values as one row; of a dtype that is only copied, as bytes."""
    flat = tensor.contiguous().reshape(1, -1)
    return flat if flat.dtype.is_floating_point else flat.view(torch.uint8)
