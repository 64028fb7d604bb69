"""Where numbers in float64 can be: not on every device."""

from __future__ import annotations

import functools

import torch

WITHOUT_FLOAT64 = ("mps",)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device adds in float64; some of one kind do, so the device is asked."""
    if device.type in WITHOUT_FLOAT64:
        return False
    try:
        one = torch.ones((), dtype=torch.float64, device=device)
        return float(one + 2.0**-40) > 1.0
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def of_float64(device: torch.device) -> torch.device:
    """Where numbers in float64 are that belong to a device: there, or on the host if it has none."""
    return device if has_float64(device) else torch.device("cpu")
