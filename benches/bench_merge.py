"""Rank-16 SVD merge of two rank-16 adapters: dense SVD, QR with a small SVD in torch, fastlora."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import require, threads, time_it
from torch import Tensor

import fastlora as fl
from fastlora.bench.opponents import merge_by_dense_svd, merge_by_qr
from fastlora.bench.workloads import Workload, make_pool
from fastlora.engine import materialise
from fastlora.pool import Pool

RANK = 16


def by_fastlora(pool: Pool) -> list[tuple[Tensor, Tensor]]:
    merged = fl.merge(pool, method="svd", rank=RANK)
    return materialise([u.baked() for u in merged.updates.values()], torch.float32)


@pytest.mark.parametrize("who, count", [("qr", 1), ("fastlora", 1), ("fastlora", 2)])
def test_merge_16_modules(benchmark: Any, who: str, count: int) -> None:
    benchmark.group = "svd merge of 2 adapters, r = 16, sixteen 4096×4096 modules"
    pool = make_pool(Workload({"dense": (4096, 4096)}, 16, 2, 16, torch.float32))
    for (B, A), (Bq, Aq) in zip(by_fastlora(pool), merge_by_qr(pool), strict=True):
        require("merged ΔW", B[:256] @ A, Bq[:256] @ Aq, 1e-4)
    run = (lambda: merge_by_qr(pool)) if who == "qr" else (lambda: by_fastlora(pool))
    time_it(benchmark, run, threads_used=count)


@pytest.mark.parametrize("who", ["dense", "fastlora"])
def test_merge_one_module(benchmark: Any, who: str) -> None:
    benchmark.group = "svd merge of 2 adapters, r = 16, one 1024×1024 module"
    pool = make_pool(Workload({"dense": (1024, 1024)}, 1, 2, 16, torch.float32))
    ((B, A),) = by_fastlora(pool)
    ((Bd, Ad),) = merge_by_dense_svd(pool)
    require("merged ΔW", B @ A, Bd @ Ad, 1e-4)
    if who == "dense":
        with threads(1):
            benchmark.pedantic(lambda: merge_by_dense_svd(pool), rounds=7, warmup_rounds=1)
    else:
        time_it(benchmark, lambda: by_fastlora(pool), threads_used=1)
