"""A bound on resident memory: how much may be worked on at once, and giving mapped files back after use."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import mmap
import re
import resource
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.errors import InputError

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
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def release(tensors: Iterable[Tensor]) -> None:
    """Gives back the pages of tensors that are mapped from files, where memory is bounded; they are read again when
    touched.

    Other memory is left alone, since it would be lost: what is file-backed is read from the system's own list of
    mappings. ``mmap.madvise`` needs the mapping's object, and torch gives none for the ``.bin`` files that it maps.
    """
    if not is_bounded():
        return
    starts, ends = _file_mappings()
    page = mmap.PAGESIZE
    for tensor in tensors:
        if not tensor.is_cpu:
            continue
        first = -(-tensor.data_ptr() // page) * page
        last = (tensor.data_ptr() + tensor.nbytes) // page * page
        i = bisect_right(starts, first) - 1
        if first < last and i >= 0 and last <= ends[i]:
            advise(tensor, mmap.MADV_DONTNEED)


def advise(tensor: Tensor, advice: int) -> None:
    """Tells the system how the whole pages of a tensor will be used; only advice, so failing changes nothing."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    if first < last:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


_libc = ctypes.CDLL(None, use_errno=True)


def _file_mappings() -> tuple[list[int], list[int]]:
    """Sorted starts and ends of private mappings of tensor files."""
    starts, ends = [], []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith("p") and fields[5].endswith((".safetensors", ".bin")):
            start, end = fields[0].split("-")
            starts.append(int(start, 16))
            ends.append(int(end, 16))
    return starts, ends
