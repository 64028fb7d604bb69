"""Batched eigendecomposition against torch.linalg.eigh, which is fastest on one thread for small matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import require, time_it

import fastlora as fl

CASES = [(8, 1792), (16, 1792), (32, 1792), (64, 1792), (128, 64)]


@pytest.mark.parametrize(
    "who, count", [("torch", 1), ("fastlora", 1), ("fastlora", 2)], ids=["torch-1", "fastlora-1", "fastlora-2"]
)
@pytest.mark.parametrize("n, batch", CASES, ids=[f"n{n}" for n, _ in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_eigh(benchmark: Any, dtype: torch.dtype, n: int, batch: int, who: str, count: int) -> None:
    benchmark.group = f"eigh {str(dtype)[6:]} n={n} batch={batch}"
    x = torch.randn(batch, n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gram = x @ x.mT
    run = torch.linalg.eigh if who == "torch" else fl.ops.eigh
    values, vectors = run(gram)
    require("eigh", (vectors * values[..., None, :]) @ vectors.mT, gram, 200 * torch.finfo(dtype).eps)
    time_it(benchmark, lambda: run(gram), threads_used=count)
