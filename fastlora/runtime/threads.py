"""Threads of torch: one only, where a library's result depends on their number; and one for each item of some work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fastlora.runtime.system import after_fork

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs the block on one thread: what LAPACK factorises has other last bits on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], count: int) -> list[Result]:
    """``work`` of each item, in their order, on ``count`` threads. It is called with one thread of torch
    (:func:`one_thread`), and so an op inside has one: threads that share one op after another wait longer for each
    other."""
    if min(count, len(items)) < 2:
        return [work(item) for item in items]
    return list(_threads(count).map(work, items))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """They are kept: a new thread needs memory of its own in every library."""
    return ThreadPoolExecutor(count, "fastlora")


after_fork(_threads.cache_clear)  # the child has none of them
