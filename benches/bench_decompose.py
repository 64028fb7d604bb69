"""A whole decomposition in memory: fastlora, plain torch in factor space, and the paper's dense algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import require, threads, time_it

import fastlora as fl
from fastlora.bench.cases import unique_factors
from fastlora.bench.opponents import dense_unique, plain_decompose
from fastlora.bench.workloads import find, make_pool
from fastlora.reference.devec import devec

THRESHOLD = 0.85


@pytest.mark.parametrize("who, count", [("torch", 1), ("torch", 2), ("fastlora", 1), ("fastlora", 2)])
@pytest.mark.parametrize("name", ["llama2-7b-8x16", "llama2-7b-8x16-fp32"])
def test_decompose(benchmark: Any, name: str, who: str, count: int) -> None:
    benchmark.group = f"decompose {name}, in memory"
    workload = find(name)
    small = make_pool(type(workload)(workload.modules, 1, workload.adapters, workload.rank, workload.dtype))
    for ours, theirs in zip(unique_factors(small), [B for B, _ in plain_decompose(small, THRESHOLD)], strict=True):
        for a, b in zip(ours, theirs, strict=False):
            require("unique B", a, b, 2e-2 if workload.dtype == torch.bfloat16 else 1e-4)
    pool = make_pool(workload)
    run = (lambda: plain_decompose(pool, THRESHOLD)) if who == "torch" else (lambda: unique_factors(pool))
    time_it(benchmark, run, threads_used=count, bytes=workload.bytes)


@pytest.mark.parametrize("who", ["dense", "torch", "fastlora"])
def test_one_module(benchmark: Any, who: str) -> None:
    """One module of 1024×1024, where the dense algorithm still ends: its cost grows with the cube of the width."""
    benchmark.group = "decompose one 1024×1024 module, 8 adapters of rank 16"
    pool = make_pool(find("one-1024-8x16"))
    (module,) = pool.modules
    deltas = [a.delta(module).double() for a in pool.adapters]
    expected = devec(deltas, threshold=THRESHOLD)
    parts = fl.decompose(pool, threshold=THRESHOLD)
    for name, unique, paper in zip(pool.names, expected.unique, dense_unique(deltas, THRESHOLD), strict=True):
        require("unique ΔW", parts.unique_of(name).delta(module), unique, 1e-5)
        require("dense unique ΔW", paper, unique, 1e-5)
    runs = {
        "dense": lambda: dense_unique(deltas, THRESHOLD),
        "torch": lambda: plain_decompose(pool, THRESHOLD),
        "fastlora": lambda: unique_factors(pool),
    }
    if who == "dense":
        with threads(2):
            benchmark.pedantic(runs[who], rounds=2, warmup_rounds=0)
    else:
        time_it(benchmark, runs[who], threads_used=1)
