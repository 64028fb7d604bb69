"""Memory of results that nobody holds is taken again; what somebody holds never is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastlora.runtime import kept_memory
from fastlora.runtime.kept_memory import LEAST, MOST, block
from fastlora.runtime.memory import bounded


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kept_memory, "_kept", [])
    yield


def kept_bytes() -> int:
    return sum(k.memory.nbytes for k in kept_memory._kept)


def test_memory_is_taken_again_when_the_last_holder_is_gone() -> None:
    first = block(4 * LEAST)
    place = first.data_ptr()
    part = first.view(torch.float32)[7:].view(-1, 1)  # a view of a view
    del first
    assert block(4 * LEAST).data_ptr() != place
    array = part.numpy()
    del part
    assert block(4 * LEAST).data_ptr() != place
    del array
    again = block(3 * LEAST)  # the one that was given up last, and not less than half of it
    assert again.nbytes == 3 * LEAST and again.is_contiguous() and again.data_ptr() % 64 == 0
    others = [block(4 * LEAST) for _ in range(2)]
    assert place in [x.data_ptr() for x in (again, *others)]
    assert len({x.data_ptr() for x in (again, *others)}) == 3


def test_results_that_are_held_stay_as_they_are() -> None:
    held = []
    for i in range(12):
        x = block(LEAST).fill_(i)
        if i % 3 == 0:
            held.append(x)
    assert [x.unique().tolist() for x in held] == [[0], [3], [6], [9]]


def test_few_bytes_are_kept() -> None:
    many = [block(MOST // 4) for _ in range(9)]
    assert kept_bytes() <= MOST
    del many
    assert kept_bytes() <= MOST
    for size in (LEAST - 64, MOST + 64):
        before = kept_bytes()
        block(size)
        assert kept_bytes() == before
    small = block(LEAST)
    place = small.data_ptr()
    del small
    assert block(2 * LEAST + 64).data_ptr() != place  # too small, and
    large = block(8 * LEAST)
    place = large.data_ptr()
    del large
    assert block(4 * LEAST - 64).data_ptr() != place  # more than twice as large as is needed


def test_nothing_is_kept_under_a_bound_on_memory() -> None:
    with bounded(2**30):
        block(LEAST)
    assert not kept_memory._kept


class SlowList(list[Any]):
    """Others have time to look at it before something is taken out."""

    def pop(self, index: Any = -1) -> Any:
        time.sleep(1e-3)
        return super().pop(index)


def test_threads_do_not_get_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "_kept", SlowList())

    held: set[int] = set()

    def work(_: int) -> None:
        for _ in range(20):
            x = block(LEAST)
            assert x.data_ptr() not in held
            held.add(x.data_ptr())
            time.sleep(1e-3)
            held.remove(x.data_ptr())
            del x

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
