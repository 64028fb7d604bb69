"""Tensors in one buffer: on a device, on the host beside it, and room that is used again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastlora.core.data import LoraData
from fastlora.core.float64 import of_float64
from fastlora.core.updates import tensors
from fastlora.runtime import kept_memory

ALIGNMENT = 128  # bytes: a line of the device's cache, and a multiple of the 16 that its widest loads need
COPYING = 8  # threads that fill a staging buffer

Shape = tuple[int, ...]


def offsets(shapes: Iterable[tuple[Shape, torch.dtype]]) -> tuple[list[int], int]:
    """Where tensors start in one buffer, in bytes, and its size."""
    starts, size = [], 0
    for shape, dtype in shapes:
        starts.append(size)
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return starts, size


def views(buffer: Tensor, starts: Sequence[int], shapes: Iterable[tuple[Shape, torch.dtype]]) -> list[Tensor]:
    """Tensors in a buffer of bytes."""
    return [
        buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for at, (shape, dtype) in zip(starts, shapes, strict=True)
    ]


def room(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialised tensors in one allocation, each at an aligned address."""
    wanted = [(shape, dtype) for shape in shapes]
    starts, size = offsets(wanted)
    return views(torch.empty(size, dtype=torch.uint8, device=device), starts, wanted)


def staging(size: int) -> Tensor:
    """Host memory that a device copies from and to without waiting, where there is one."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on another device, in one buffer, by one copy between the host and the device.

    Copies to a device do not wait: they are ordered on its current stream. Copies from a device wait. What is float64
    stays on the host where the device has none.
    """
    stay = [t.dtype == torch.float64 and t.device == of_float64(device) for t in tensors]
    if any(stay):
        others = [t for t, stays in zip(tensors, stay, strict=True) if not stays]
        rest = iter(moved(others, device) if others else ())
        return [t if stays else next(rest) for t, stays in zip(tensors, stay, strict=True)]
    layout = [(tuple(t.shape), t.dtype) for t in tensors]
    starts, size = offsets(layout)
    if device.type == "cpu":
        there = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
        for view, tensor in zip(views(there, starts, layout), tensors, strict=True):
            view.copy_(tensor)
        here = staging(size)
        here.copy_(there)
        return views(here, starts, layout)
    here = staging(size)
    _fill(views(here, starts, layout), tensors)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    there.copy_(here, non_blocking=True)
    return views(there, starts, layout)


def _fill(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies on the host, on as many threads as help."""
    count = min(COPYING, os.cpu_count() or 1, 1 + sum(t.nbytes for t in tensors) // 2**24)
    pairs = list(zip(targets, tensors, strict=True))
    shares = [pairs[i::count] for i in range(count)]
    if count == 1:
        _copy(pairs)
        return
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(_copy, shares))


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for target, tensor in pairs:
        target.copy_(tensor)


def moved_once(tensors: Mapping[object, Tensor], device: torch.device) -> dict[object, Tensor]:
    """Tensors by their identity on another device, in one buffer, by one copy. What came from the host is not copied
    back: its original is taken. Coefficients in float64 stay on the host where the device has none."""
    home = {key: origin(t) for key, t in tensors.items()} if device.type == "cpu" else {}
    home |= {key: t for key, t in tensors.items() if t.dtype == torch.float64 and t.device == of_float64(device)}
    wanted = [key for key in tensors if home.get(key) is None]
    there = dict(zip(wanted, moved([tensors[k] for k in wanted], device), strict=True)) if wanted else {}
    if device.type != "cpu":
        for key, tensor in there.items():
            _remember(tensor, tensors[key])
    return there | {key: host for key, host in home.items() if host is not None}


def refill(target: LoraData, source: LoraData) -> None:
    """Copies the matrices of an adapter into those of another of the same shapes, on the current stream: from the host
    by one copy into the buffer that :func:`to` made."""
    pairs = [
        (mine, other)
        for m, update in target.updates.items()
        for mine, other in zip(tensors(update), tensors(source.updates[m]), strict=True)
    ]
    storages = {mine.untyped_storage().data_ptr(): mine for mine, _ in pairs}
    if target.device.type == "cpu" or source.device.type != "cpu" or len(storages) != 1:
        _copy(pairs)
        return
    buffer = torch.empty(0, dtype=torch.uint8, device=target.device).set_(pairs[0][0].untyped_storage())
    here = staging(buffer.nbytes)
    staged = [
        here[mine.storage_offset() * mine.element_size() :][: mine.nbytes].view(mine.dtype).view(mine.shape)
        for mine, _ in pairs
    ]
    _fill(staged, [other for _, other in pairs])
    buffer.copy_(here, non_blocking=True)
    for mine, other in pairs:
        _remember(mine, other)


_hosts = WeakTensorKeyDictionary()
"""Matrices of the host by their copies on a device, as long as those live."""


def _remember(tensor: Tensor, host: Tensor) -> None:
    _hosts[tensor] = host


def origin(tensor: Tensor) -> Tensor | None:
    """The host's copy of a matrix on a device, where it came from there."""
    host: Tensor | None = _hosts.get(tensor)  # type: ignore[no-untyped-call]
    return host


class ResultRoom:
    """Memory for results, handed out piece by piece and reused after :meth:`reserve`.

    On the host it is memory of earlier results where some is left (:mod:`fastlora.runtime.kept_memory`).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, Tensor] = {}  # the block as elements of a dtype
        self._used = 0

    def reserve(self, size: int) -> None:
        """Room for ``size`` bytes; what was handed out before is given up."""
        self._used = 0
        if self._block.nbytes < size:
            size, device = padded(size), self._block.device
            on_host = device.type == "cpu"
            self._block = kept_memory.block(size) if on_host else torch.empty(size, dtype=torch.uint8, device=device)
            self._typed = {}

    def take(self, shape: tuple[int, int], dtype: torch.dtype, count: int) -> Sequence[Tensor]:
        """Uninitialised matrices of one shape in the room."""
        rows, columns = shape
        size = padded(rows * columns * dtype.itemsize)
        if not size:
            return [torch.empty(shape, dtype=dtype, device=self._block.device)] * count
        start, self._used = self._used, self._used + count * size
        if self._used > self._block.nbytes:
            raise ValueError(f"{self._used} bytes are taken of a room for {self._block.nbytes}")
        if dtype not in self._typed:
            self._typed[dtype] = self._block.view(dtype)
        first = start // dtype.itemsize
        if count == 1:
            return (self._typed[dtype].as_strided(shape, (columns, 1), first),)
        strides = size // dtype.itemsize, columns, 1
        matrices: Sequence[Tensor] = self._typed[dtype].as_strided((count, rows, columns), strides, first).unbind()
        return matrices


def padded(size: int) -> int:
    """Bytes rounded up to whole cache lines."""
    return -(-size // 64) * 64
