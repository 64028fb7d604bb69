"""Products of tall matrices on several threads, with the same bits for any number of them.

They are called with one thread of torch (:func:`fastlora.runtime.threads.one_thread`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.runtime.threads import in_threads

CHUNKS = 8
"""Of rows. Fixed, so that sums have one order."""
LARGE = 1 << 25
"""Products of fewer multiplications are done before a second thread has begun."""


def inner(x: Tensor, y: Tensor, threads: int) -> Tensor:
    """``xᵀ y`` of ``x [n, k]`` and ``y [n, l]``."""
    parts = in_threads(lambda rows: x[rows].mT @ y[rows], _chunks(x), _useful(x, y.shape[1], threads))
    total = parts[0] if parts else x.new_zeros(x.shape[1], y.shape[1])
    for part in parts[1:]:
        total += part
    return total


def turned(x: Tensor, small: Tensor, threads: int) -> Tensor:
    """``x small`` of ``x [n, k]`` and ``small [k, l]``."""
    out = x.new_empty(x.shape[0], small.shape[1])
    in_threads(lambda rows: torch.mm(x[rows], small, out=out[rows]), _chunks(x), _useful(x, small.shape[1], threads))
    return out


def _chunks(x: Tensor) -> list[slice]:
    n = len(x)
    length = max(1, -(-n // CHUNKS))
    return [slice(first, min(first + length, n)) for first in range(0, n, length)]


def _useful(x: Tensor, columns: int, threads: int) -> int:
    return threads if x.numel() * columns >= LARGE else 1
