"""What is switched on belongs to the thread, or the task, that switches it on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import pools
import pytest
import torch

import fastlora as fl
from fastlora.engine import gram_cache, stream
from fastlora.ops import dispatch
from fastlora.runtime import memory, progress


def pool_gram() -> fl.PoolGram:
    return fl.PoolGram(pools.make_pool(pools.cast(pools.planted(2), torch.float32)))


HANGS = 600  # seconds that no step takes
GRAM = pool_gram()
DEVICE = stream.Stream(torch.device("cpu"), 2**20)
# What is switched on, and what shows whether it is.
SWITCHES: dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[], object], object]] = {
    "PoolGram": (lambda: GRAM, lambda: len(gram_cache.entered()), 0),
    "use_backend": (lambda: fl.use_backend("reference"), dispatch.current_backend, dispatch.current_backend()),
    "bounded": (lambda: memory.bounded(2**30), memory.is_bounded, False),
    "streamed": (lambda: stream.streamed(DEVICE), stream.current, None),
    "show_progress": (progress.show_progress, progress.is_shown, False),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_threads(switch: str) -> None:
    """One thread enters first and leaves first, the other the same way round; a third one never enters."""
    make, state, off = SWITCHES[switch]
    steps = {name: threading.Event() for name in ("first in", "second in", "first out")}

    def first() -> object:
        with make():
            steps["first in"].set()
            assert steps["second in"].wait(HANGS)
        steps["first out"].set()
        return state()

    def second() -> object:
        assert steps["first in"].wait(HANGS) and state() == off
        with make():
            steps["second in"].set()
            assert steps["first out"].wait(HANGS) and state() != off
        return state()

    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(work) for work in (first, second)]
        assert [r.result(HANGS) for r in results] == [off, off]
        assert [threads.submit(state).result(HANGS) for _ in range(4)] == [off] * 4
    assert state() == off


@pytest.mark.parametrize("switch", SWITCHES)
def test_tasks(switch: str) -> None:
    """Tasks that take turns inside their blocks."""
    make, state, off = SWITCHES[switch]

    async def work(turns: int) -> object:
        assert state() == off
        with make():
            for _ in range(turns):
                await asyncio.sleep(0)
                assert state() != off
        return state()

    async def watch() -> list[object]:
        seen = []
        for _ in range(6):
            await asyncio.sleep(0)
            seen.append(state())
        return seen

    async def together() -> list[object]:
        return await asyncio.gather(work(2), work(5), watch(), work(1))

    first, second, seen, third = asyncio.run(together())
    assert [first, second, third] == [off] * 3 and seen == [off] * 6
    assert state() == off


def test_a_pool_gram_may_be_left_in_any_order() -> None:
    other = pool_gram()
    GRAM.__enter__()
    other.__enter__()
    GRAM.__enter__()
    GRAM.__exit__(None, None, None)
    assert gram_cache.entered()[-1] is other._cache
    GRAM.__exit__(None, None, None)
    assert [c is other._cache for c in gram_cache.entered()] == [True]
    other.__exit__(None, None, None)
    assert gram_cache.entered() == ()


def test_a_pool_gram_left_where_it_was_not_entered_changes_nothing() -> None:
    """As with a stack that another thread closes: there is nothing to take back there, and nothing breaks."""
    stack = ExitStack()
    stack.enter_context(GRAM)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(stack.close).result(HANGS)
    assert len(gram_cache.entered()) == 1
    with contextlib.ExitStack() as again:
        again.push(GRAM)
    assert gram_cache.entered() == ()


def test_blocks_of_a_pool_gram_are_the_same_from_many_threads() -> None:
    """All ops that use one object at once have the bits of one thread."""
    pool = pools.make_pool(pools.cast(pools.ragged(3), torch.float32))
    gram = fl.PoolGram(pool)
    uses: list[Callable[[], torch.Tensor]] = [
        lambda: gram.merge(rank=3).delta(pools.MODULE),
        lambda: gram.merge({"a0": 0.5}, energy=0.9).delta(pools.MODULE),
        lambda: gram.decompose(0.5).shared.delta(pools.MODULE),
        lambda: gram.overlap().subspace,
        lambda: torch.tensor(list(fl.weights(gram).values())),
    ]
    wanted = [use() for use in uses]
    again = fl.PoolGram(pool)
    gram = again
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: (i % len(uses), uses[i % len(uses)]()), range(40)))
    assert all(torch.equal(x, wanted[i]) for i, x in found)
