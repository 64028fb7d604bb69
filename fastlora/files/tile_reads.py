"""Rows of stored tensors, read into memory of the caller's own: what a model larger than memory is computed from."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.files.tensor_files import StoredTensor
from fastlora.runtime.system import open_to_read, read_at


class TileReads:
    """``with TileReads() as tiles: tiles.rows(tensor, 0, 128)`` — reads rows of :class:`StoredTensor`.

    Files are read, not mapped, so that what is resident is the caller's tiles and nothing else. They stay open until
    the block ends. Threads may share one: reads are positional.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> TileReads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        """The open file of a path. Raises :class:`InputError` where it cannot be opened."""
        found = self._files.get(path)
        if found is None:
            try:
                found = open_to_read(path)
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}); check it and its permissions") from None
            other = self._files.setdefault(path, found)
            if other != found:  # another thread was first
                os.close(found)
            found = other
        return found

    def rows(self, tensor: StoredTensor, start: int, stop: int, into: Scratch | None = None) -> Tensor:
        """``W[start:stop]`` as it is stored, ``[stop − start, …]``; a scalar is ``W`` itself, by the rows 0 to 1.

        ``into``: memory that is used again from call to call, whose last rows are overwritten; else new memory.
        Raises :class:`InputError` for a file that is shorter than it was, or cannot be read.
        """
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        if tensor.view is not None:
            return tensor.view[start:stop] if tensor.shape else tensor.view
        if tensor.file is None or tensor.dtype is None:
            raise InputError(f"{tensor.name!r} is stored as {tensor.code}, which cannot be computed with")
        size = (stop - start) * tensor.row_size
        scratch = into if into is not None else Scratch()
        memory = scratch.bytes(size)
        self.read(tensor.file, tensor.offset + start * tensor.row_size, memory)
        return scratch.tensor(tensor.dtype, shape)

    def read(self, path: Path, offset: int, memory: memoryview) -> None:
        """Fills ``memory`` with the bytes of a file from ``offset`` on."""
        descriptor = self.descriptor(path)
        done = 0
        while done < len(memory):
            try:
                count = read_at(descriptor, memory[done:], offset + done)
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}); check the disk") from None
            if not count:
                raise InputError(f"{path} is shorter than its header says; it was changed or cut off: copy it again")
            done += count


class Scratch:
    """Memory that tiles are read into, one after another; it grows to the largest."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def bytes(self, size: int) -> memoryview:
        """The first ``size`` bytes."""
        if size > len(self._memory):
            self._memory = mmap.mmap(-1, size)
        return memoryview(self._memory)[:size]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The first bytes as a tensor, which shares the memory."""
        count = 1
        for length in shape:
            count *= length
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).view(shape)
