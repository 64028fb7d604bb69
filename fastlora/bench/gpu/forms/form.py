"""One form of a kernel: a call that reaches it, and how far its answer may be from the one in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """How far an answer is from the one in float64, both numbers in one unit. ``kernels``: what was launched, where a
    plan knows it."""

    error: float
    allowed: float
    kernels: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed  # not of NaN


Check = Callable[[str], Found]
"""Computes on the device that it is given; raises :class:`Unavailable` where that has no such form."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form by name."""

    name: str
    check: Check


def worst(*found: Found) -> Found:
    """Several answers as one: the largest error as a part of what is allowed, NaN above all."""
    kernels = tuple(dict.fromkeys(name for f in found for name in f.kernels))
    nan = [f for f in found if f.error != f.error]
    chosen = nan[0] if nan else max(found, key=lambda f: f.error / f.allowed)
    return Found(chosen.error, chosen.allowed, kernels)


def largest(difference: Tensor, scale: float | Tensor = 1.0) -> float:
    """The largest absolute value, relative to ``scale``; NaN where there is one."""
    if not difference.numel():
        return 0.0
    return float((difference.abs() / scale).max())


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
