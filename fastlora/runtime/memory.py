"""A bound on resident memory: how much may be worked on at once, and giving mapped files back after use."""

from __future__ import annotations

import contextlib
import contextvars
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastlora.errors import InputError
from fastlora.runtime import system

if TYPE_CHECKING:
    from torch import Tensor

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LEAST = 8 * 2**20  # bytes worked on at once, however small the bound
SHARE = 6  # parts of the free memory: inputs, results being made, results being written, and what allocators keep

_bound: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastlora_memory", default=None)


def parse(memory: int | str | None) -> int | None:
    """Bytes of ``1073741824``, ``"1GiB"``, ``"512 MB"``, …; ``None`` is no bound."""
    if memory is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(memory), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"memory={memory!r}: give a number of bytes or a size such as 1GiB or 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


@contextlib.contextmanager
def bounded(memory: int | None) -> Iterator[None]:
    """Bounds the peak resident memory of what runs inside the block, as far as one module allows."""
    token = _bound.set(memory)
    try:
        yield
    finally:
        _bound.reset(token)


def is_bounded() -> bool:
    """Whether a bound on memory is in use."""
    return _bound.get() is not None


def batch_bytes(default: int) -> int:
    """How many bytes of factors to work on at once."""
    bound = _bound.get()
    if bound is None:
        return default
    free = bound - resident()
    return max(LEAST, min(default, free // SHARE))


def resident() -> int:
    """Resident bytes of this process now."""
    return system.resident()


def release(tensors: Iterable[Tensor]) -> None:
    """Gives back the pages of tensors that are mapped from files, where memory is bounded; they are read again when
    touched.

    Other memory is left alone, since it would be lost: what is file-backed is read from the system's own list of
    mappings. ``mmap.madvise`` needs the mapping's object, and torch gives none for the ``.bin`` files that it maps.
    """
    if is_bounded():
        for tensor, _ in _mapped(tensors):
            advise(tensor, system.DONT_NEED)


class MappedFiles:
    """The mapped files that some tensors lie in. When a small tensor is touched, the system maps what lies around it
    too: a pool of many small files would come to be in memory as a whole."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._places = sorted({place for _, place in _mapped(tensors)})

    def give_back(self) -> None:
        """Gives back the pages of the files, which are read again when touched; without a bound on memory only those of
        files into whose mapping nobody has written, as far as the system tells."""
        for start, end in self._places if is_bounded() else system.unwritten(self._places):
            system.advise(start, end - start, system.DONT_NEED)


def _mapped(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The tensors that are mapped from files, and where their mapping starts and ends."""
    starts, ends = system.file_mappings((".safetensors", ".bin"))
    for tensor in tensors:
        if tensor.is_cpu:
            i = bisect_right(starts, tensor.data_ptr()) - 1
            if i >= 0 and tensor.data_ptr() + tensor.nbytes <= ends[i]:
                yield tensor, (starts[i], ends[i])


def advise(tensor: Tensor, advice: int | None) -> None:
    """Tells the system how the whole pages of a tensor will be used; only advice, so failing changes nothing."""
    system.advise(tensor.data_ptr(), tensor.nbytes, advice)
