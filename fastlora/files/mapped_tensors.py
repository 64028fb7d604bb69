"""Tensors where they lie in a mapped file."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
}
"""What NumPy reads tensors as: it has no bfloat16, so its bits."""

_NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies behind the header. ``dtype`` is ``None`` where a view is not simple to make: of an unusual
    dtype, or of no bytes."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    last: int
    code: str


class MappedFile(NamedTuple):
    """A safetensors file that is sound: what lies where (the same object for files whose headers are alike, as long as
    that is remembered), where the first tensor may lie, the mapped bytes, and the first of them as they were read."""

    places: dict[str, Place]
    start: int
    mapping: mmap.mmap
    head: bytes


def array_at(file: MappedFile, place: Place, part: tuple[slice, ...]) -> npt.NDArray[np.floating]:
    """Part of a floating-point tensor at a place as an array, which is made in a third of a tensor's time."""
    dtype = cast(torch.dtype, place.dtype)
    # No page is touched of a file that is read far enough.
    memory = file.head if file.start + place.last <= len(file.head) else file.mapping
    stored = np.ndarray(place.shape, NUMPY[dtype], memory, file.start + place.first)[part]
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype is torch.bfloat16 else stored


class Views:
    """Tensors in a mapped file, as views of one tensor for each dtype and remainder of the offset."""

    def __init__(self, mapping: mmap.mmap, start: int) -> None:
        self._mapping = mapping
        self._start = start
        self._whole: dict[tuple[torch.dtype, int], Tensor] = {}

    def of(self, place: Place) -> Tensor:
        """The tensor at a place of a simple dtype."""
        return self.at(cast(torch.dtype, place.dtype), place.first, place.shape, place.strides)

    def at(self, dtype: torch.dtype, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A view of elements that start ``first`` bytes behind the header."""
        index, remainder = divmod(self._start + first, dtype.itemsize)
        whole = self._whole.get((dtype, remainder))
        if whole is None:
            count = (len(self._mapping) - remainder) // dtype.itemsize
            whole = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=remainder)
            self._whole[dtype, remainder] = whole
        return whole.as_strided(shape, strides, index)


class Runs:
    """Some tensors of a file, those of one shape that lie at equal distances in one step: single views take three times
    as long. ``places``: in the order wanted, of simple dtypes."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._runs: list[tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...], list[int]]] = []
        alike: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
        for i, place in enumerate(places):
            alike.setdefault((cast(torch.dtype, place.dtype), place.shape), []).append(i)
        for (dtype, shape), members in alike.items():
            members.sort(key=lambda i: places[i].first)
            firsts, at = [places[i].first for i in members], 0
            while at < len(members):
                step, end = dtype.itemsize, at + 1
                if end < len(members) and (firsts[end] - firsts[at]) % dtype.itemsize == 0:
                    step = firsts[end] - firsts[at]
                    while end < len(members) and firsts[end] == firsts[end - 1] + step:
                        end += 1
                strides = (step // dtype.itemsize, *places[members[at]].strides)
                self._runs.append((dtype, firsts[at], (end - at, *shape), strides, members[at:end]))
                at = end
        self._count = len(places)

    def tensors(self, mapping: mmap.mmap, start: int) -> list[Tensor]:
        """Views of a mapped file whose places these are, behind a header that ends at ``start``."""
        found: list[Tensor] = [_NOTHING] * self._count
        views = Views(mapping, start)
        for dtype, first, shape, strides, members in self._runs:
            for i, tensor in zip(members, views.at(dtype, first, shape, strides).unbind(), strict=True):
                found[i] = tensor
        return found
