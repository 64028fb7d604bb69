"""Devices: which there are, which one to compute on, and what to say when its memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fastlora.errors import DeviceMemoryError, InputError


def parse(device: str | torch.device | None) -> torch.device | None:
    """A device to compute on; ``None`` and ``"auto"`` leave tensors where they are.

    Raises :class:`InputError` for a device that does not exist here, with the reason.
    """
    if device is None or device == "auto":
        return None
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = torch.device("meta")
    if parsed.type not in ("cpu", "cuda"):
        other = None if parsed.type == "meta" else _other(parsed)
        if other is None:
            raise InputError(f"device {str(device)!r} does not exist: use auto, cpu, cuda or cuda:N")
        return other
    if parsed.type == "cuda":
        reason = unavailable(parsed.index)
        if reason is not None:
            raise InputError(f"device {str(device)!r} cannot be used: {reason}. Use cpu (`--device cpu`)")
        parsed = torch.device("cuda", torch.cuda.current_device() if parsed.index is None else parsed.index)
    return parsed


def _other(device: torch.device) -> torch.device | None:
    """A device of another kind that torch computes on here, such as Apple's or Intel's, with its number."""
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator() != torch.device(device.type):
        return None
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.device(device.type, index) if index < torch.accelerator.device_count() else None


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
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return lines


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
