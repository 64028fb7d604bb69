"""What the benches share: opponents at their best, checked answers, and physics beside the time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Refuses to time a wrong answer."""
    scale = float(expected.double().abs().max()) or 1.0
    error = float((got.double() - expected.double()).abs().max()) / scale
    assert error <= tolerance, f"{what}: error {error:.2e} above {tolerance:.0e}; a wrong answer is not timed"


def time_it(benchmark: Any, run: Any, *, threads_used: int, **extra: object) -> None:
    """Medians of at least seven rounds; how the threads wait is part of the result on small machines."""
    benchmark.extra_info.update(
        extra,
        threads=threads_used,
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", "not set"),
        torch=torch.__version__,
    )
    with threads(threads_used):
        benchmark.pedantic(run, rounds=9, warmup_rounds=2)
