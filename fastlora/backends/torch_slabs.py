"""Slabs of factors in memory that stays in cache, and the threads that share passes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.runtime.threads import in_threads, one_thread

SLAB_BYTES = 2**19  # of what is converted at once on a CPU
WORTH = 2**23  # elements of factors for every thread: with fewer, waiting for each other costs more than it brings

Work = TypeVar("Work")
Found = TypeVar("Found")


class Memory:
    """Memory of one thread, used again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, length: int, rows: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[count, length]`` that lies as the factors of a side do."""
        held = self._held.get(name)
        if held is None or held.numel() < count * length or held.dtype != dtype or held.device != device:
            held = self._held[name] = torch.empty(count * length, dtype=dtype, device=device)
        x = held[: count * length]
        return x.view(count, length) if rows else x.view(length, count).mT

    def side_by_side(self, name: str, factors: Sequence[Tensor], rows: bool) -> Tensor:
        """``[Σ r, n]``, as they are stored."""
        first = factors[0]
        if len(factors) == 1:
            return first if rows else first.mT
        if any(x.dtype != first.dtype for x in factors):
            x = torch.cat(tuple(factors), 0 if rows else 1)
            return x if rows else x.mT
        count = sum(x.shape[0 if rows else 1] for x in factors)
        x = self.rows(name, count, first.shape[1 if rows else 0], rows, first.dtype, first.device)
        torch.cat(tuple(factors), 0 if rows else 1, out=x if rows else x.mT)
        return x


def shared(work: Callable[[Work, Memory], Found], items: Sequence[Work], sizes: Sequence[int]) -> list[Found]:
    """The work of all items, neighbours on one of as many threads as are worth it; each has one thread of torch."""
    ends = list(itertools.accumulate(sizes, initial=0))
    threads = min(torch.get_num_threads(), max(1, ends[-1] // WORTH))
    cuts = [bisect.bisect_left(ends, ends[-1] * t / threads) for t in range(threads)] + [len(items)]

    def run(part: range) -> list[Found]:
        memory = Memory()
        with torch.no_grad():  # it holds in one thread
            return [work(items[i], memory) for i in part]

    with one_thread():
        parts = in_threads(run, [range(a, b) for a, b in itertools.pairwise(cuts)], threads)
    return [found for part in parts for found in part]


def places_of(widths: Sequence[int]) -> list[slice]:
    """Of things side by side."""
    ends = itertools.accumulate(widths)
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def slab_length(n: int, width: int) -> int:
    """How many of the ``n`` numbers of each of ``width`` columns are a slab."""
    return max(1, min(n, max(256, SLAB_BYTES // max(1, 8 * width))))
