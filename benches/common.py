"""The cases of ``fastlora bench`` as benchmarks of pytest.

A case alternates its contenders, which pytest-benchmark cannot do: it times one test after the other. So a contest is
measured as a whole when the first of its tests runs, and each test hands its rounds over on a clock of its own.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlora.bench.cases import CASES
from fastlora.bench.contest import OURS, Contest, Unavailable, best, measure
from fastlora.bench.timing import thread_counts

measured = functools.lru_cache(1)(measure)


class Clock:
    """Time that passes only when a recorded round is played."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: list[float] = []

    def read(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += self.rounds.pop(0)


clock = Clock()


def benchmarks(case: str) -> Callable[..., None]:
    """A test function over every contest of a case: fastlora by threads, and each opponent at its best."""
    contests = CASES[case].contests()
    parameters = [
        pytest.param(contest, who, count, id=f"{contest.what}: {who}" + (f", {count}" if count else ""))
        for contest in contests
        for who, count in [*((OURS, c) for c in thread_counts()), *((o, None) for o in contest.opponents)]
    ]

    @pytest.mark.parametrize(("contest", "who", "count"), parameters)
    @pytest.mark.benchmark(timer=clock.read)
    def test(benchmark: Any, contest: Contest, who: str, count: int | None) -> None:
        try:
            task, times = measured(contest)
        except Unavailable as reason:
            pytest.skip(str(reason))
        if count is None:
            count, _ = best(who, {key: statistics.median(own) for key, own in times.items()})
        elif (who, count) not in times:
            pytest.skip(f"not measured on {count} threads")
        benchmark.group = contest.what
        benchmark.extra_info.update(
            threads=count,
            bytes=task.moved,
            operations={str(dtype): count for dtype, count in task.operations.items()},
            note=task.note,
            omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", "not set"),
            torch=torch.__version__,
        )
        clock.rounds = list(times[who, count])
        benchmark.pedantic(clock.play, rounds=len(clock.rounds))

    return test
