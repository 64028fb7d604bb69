"""Ranks that are threads of this process: what they share, without the seconds that processes take to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.runtime import ranks

R = TypeVar("R")
PATIENCE = 60.0  # seconds in which a rank comes to an exchange where the others wait


class ThreadRank(ranks.Ranks):
    """One of them. ``slots``: what each brings to the exchange that they are at."""

    def __init__(self, rank: int, count: int, meeting: threading.Barrier, slots: list[Tensor | None]) -> None:
        super().__init__(rank, count, None)
        self.meeting, self.slots, self.exchanges = meeting, slots, 0

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.slots[self.rank] = tensor
        self.exchanges += 1
        self.meeting.wait(PATIENCE)
        found = [slot.clone() for slot in self.slots if slot is not None]
        self.meeting.wait(PATIENCE)
        return found


def on_ranks(count: int, work: Callable[[], R]) -> list[R]:
    """What ``work`` gives on each of ``count`` ranks, each with one thread to compute on; raises the error of the first
    that failed by itself."""
    meeting, slots = threading.Barrier(count), [None] * count
    members = [ThreadRank(rank, count, meeting, slots) for rank in range(count)]  # type: ignore[arg-type]

    def run(member: ThreadRank) -> R:
        torch.set_num_threads(1)
        try:
            with ranks.among(member) if count > 1 else nullcontext():
                return work()
        except BaseException as error:
            if not member.knows(error):
                meeting.abort()
            raise

    before = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        pending = [pool.submit(run, member) for member in members]
        errors = [error for error in (p.exception() for p in pending) if error is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e.__cause__, threading.BrokenBarrierError)), errors[0])
        results = [p.result() for p in pending]
    torch.set_num_threads(before)  # some of it holds for all threads
    assert count == 1 or len({m.exchanges for m in members}) == 1
    return results
