"""Devices: which one to compute on, and adapters on it in one buffer each."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.adapter import Adapter, Factor, Update, source_key
from fastlora.errors import DeviceMemoryError, InputError

ALIGNMENT = 128  # bytes: a line of the device's cache, and a multiple of the 16 that its widest loads need
COPYING = 8  # threads that fill a staging buffer

Shape = tuple[int, ...]


def parse(device: str | torch.device | None) -> torch.device | None:
    """A device to compute on; ``None`` and ``"auto"`` leave tensors where they are.

    Raises :class:`InputError` for a device that does not exist here, with the reason.
    """
    if device is None or device == "auto":
        return None
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} does not exist: use auto, cpu, cuda or cuda:N")
    if found.type == "cuda":
        reason = unavailable(found.index)
        if reason is not None:
            raise InputError(f"device {str(device)!r} cannot be used: {reason}. Use cpu (`--device cpu`)")
        found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found


def unavailable(index: int | None = None) -> str | None:
    """Why there is no CUDA device, or not that one; ``None`` where it is."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (`nvidia-smi` says whether the driver does)"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return f"there are {count} CUDA devices, numbered from 0"
    return None


def describe() -> list[str]:
    """The CUDA devices, or the reason why there are none."""
    reason = unavailable()
    if reason is not None:
        return [f"no CUDA device: {reason}"]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def out_of_memory(what: str) -> DeviceMemoryError:
    """The error of something that did not fit on the current device."""
    free = ""
    if torch.cuda.is_available():
        left, total = torch.cuda.mem_get_info()
        free = f" ({left / 2**30:.1f} of {total / 2**30:.1f} GiB are free)"
    return DeviceMemoryError(
        f"{what}: the memory of the device does not suffice{free}. Bound it with memory= (`--memory`), which streams "
        "the factors through it, use fewer adapters at once, or compute on the CPU (`--device cpu`)"
    )


@contextlib.contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Memory of the device that runs out inside the block is told by name."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise out_of_memory(what) from None


def require_host(adapter: Adapter, what: str) -> None:
    """Refuses an adapter on a device where ``what`` computes on the CPU alone."""
    if adapter.device.type != "cpu":
        raise InputError(
            f"{what} computes on the CPU, and adapter {adapter.name!r} is on {adapter.device}: use `.to('cpu')`"
        )


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

    Copies to a device do not wait: they are ordered on its current stream. Copies from a device wait.
    """
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


def to(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter with its matrices and coefficients on a device: one buffer, one copy. Extras stay on the host.

    A matrix that came from the host is not copied back: its original is taken.
    """
    if adapter.device == device:
        return adapter
    by_key = distinct(adapter.updates.values())
    home = {key: origin(t) for key, t in by_key.items()} if device.type == "cpu" else {}
    wanted = [key for key in by_key if home.get(key) is None]
    with memory_told(f"moving adapter {adapter.name!r} to {device}"):
        found = dict(zip(wanted, moved([by_key[k] for k in wanted], device), strict=True)) if wanted else {}
    if device.type != "cpu":
        for key, tensor in found.items():
            _remember(tensor, by_key[key])
    places = found | {key: own for key, own in home.items() if own is not None}
    result = Adapter(
        adapter.name,
        {m: replaced(u, places) for m, u in adapter.updates.items()},
        extras=adapter.extras,
        base=adapter.base,
        dtype=adapter.dtype,
        provenance=adapter.provenance,
        notes=adapter.notes,
    )
    result.details = dict(adapter.details)
    return result


def refill(target: Adapter, source: Adapter) -> None:
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
    places = [
        here[mine.storage_offset() * mine.element_size() :][: mine.nbytes].view(mine.dtype).view(mine.shape)
        for mine, _ in pairs
    ]
    _fill(places, [other for _, other in pairs])
    buffer.copy_(here, non_blocking=True)
    for mine, other in pairs:
        _remember(mine, other)


def _remember(tensor: Tensor, host: Tensor) -> None:
    tensor.fastlora_host = host  # type: ignore[attr-defined]


def origin(tensor: Tensor) -> Tensor | None:
    """The host's copy of a matrix on a device, where it came from there."""
    found: Tensor | None = getattr(tensor, "fastlora_host", None)
    return found


def tensors(update: Update) -> list[Tensor]:
    """Matrices and coefficients, those of ``B`` first."""
    return [x for f in (update.B, update.A) for t in f.terms for x in (t.source, t.coefficient) if x is not None]


def distinct(updates: Iterable[Update]) -> dict[object, Tensor]:
    """The matrices and coefficients of some updates by identity, each once; those of ``B`` first."""
    found: dict[object, Tensor] = {}
    for side in ("B", "A"):
        for update in updates:
            for term in (update.B if side == "B" else update.A).terms:
                for tensor in (term.source, term.coefficient):
                    if tensor is not None:
                        found.setdefault(source_key(tensor), tensor)
    return found


def replaced(update: Update, places: dict[object, Tensor]) -> Update:
    """The update on other tensors, by the identity of its own."""
    return replace(update, B=_factor(update.B, places), A=_factor(update.A, places))


def _factor(factor: Factor, places: dict[object, Tensor]) -> Factor:
    terms = tuple(
        replace(
            t,
            source=places[source_key(t.source)],
            coefficient=None if t.coefficient is None else places[source_key(t.coefficient)],
        )
        for t in factor.terms
    )
    return replace(factor, terms=terms)
