"""Slabs of factors, converted into memory that stays in cache, and the threads that share passes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.runtime.threads import in_threads, one_thread

SLAB_BYTES = 2**20  # of factors that are worked on at once on a CPU
WORTH = 2**23  # elements of factors for every thread: with fewer, waiting for each other costs more than it brings
LONG = 2**15  # elements of a factor: with fewer, threads wait for Python

Work = TypeVar("Work")
Found = TypeVar("Found")


class Memory:
    """Memory of one thread, used again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A matrix whose elements are whatever they are."""
        free = self._free.get((shape, dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def converted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x``, or a copy of it in another dtype."""
        return x if x.dtype == dtype else self.take(x.shape, dtype).copy_(x)

    def give(self, *taken: Tensor) -> None:
        """What was taken is not needed any more."""
        for x in taken:
            self._free.setdefault((x.shape, x.dtype), []).append(x)


def shared(work: Callable[[Work, Memory], Found], items: Sequence[Work], sizes: Sequence[Sequence[int]]) -> list[Found]:
    """The work of all items, neighbours on one of as many threads as are worth it; each has one thread of torch.

    ``sizes``: elements of the factors of each item.
    """
    ends = list(itertools.accumulate(map(sum, sizes), initial=0))
    long = ends[-1] >= LONG * sum(map(len, sizes))
    threads = min(torch.get_num_threads(), max(1, ends[-1] // WORTH)) if long else 1
    cuts = [bisect.bisect_left(ends, ends[-1] * t / threads) for t in range(threads)] + [len(items)]

    def run(part: range) -> list[Found]:
        memory = Memory()
        with torch.no_grad():  # it holds in one thread
            return [work(items[i], memory) for i in part]

    with one_thread():
        parts = in_threads(run, [range(a, b) for a, b in itertools.pairwise(cuts)], threads)
    return [found for part in parts for found in part]


class Uses:
    """Factors in the order in which they are used, by their numbers: ``last`` is the last use of each, ``columns`` the
    most that there are at once, if each is there from its first use to its last."""

    def __init__(self, uses: Sequence[Collection[int]], widths: Sequence[int]) -> None:
        self.last = {i: u for u, used in enumerate(uses) for i in used}
        self.columns, now, seen = 0, 0, set[int]()
        for u, used in enumerate(uses):
            now += sum(widths[i] for i in used if i not in seen)
            seen.update(used)
            self.columns = max(self.columns, now)
            now -= sum(widths[i] for i in used if self.last[i] == u)


def slabs(x: Tensor, length: int, axis: int) -> Sequence[Tensor]:
    """``x`` itself where it is one."""
    return [x] if x.shape[axis] <= length else torch.split(x, length, axis)


def slab_length(n: int, width: int, dtype: torch.dtype) -> int:
    """How many of the ``n`` numbers of each of ``width`` columns there are at once."""
    return max(1, min(n, max(256, SLAB_BYTES // max(1, dtype.itemsize * width))))
