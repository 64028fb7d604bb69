"""Batched small singular value decomposition against torch.linalg.svd on one thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import require, time_it

import fastlora as fl

CASES = [(8, 1792), (16, 1792), (32, 448), (64, 224), (128, 64)]


@pytest.mark.parametrize(
    "who, count", [("torch", 1), ("fastlora", 1), ("fastlora", 2)], ids=["torch-1", "fastlora-1", "fastlora-2"]
)
@pytest.mark.parametrize("n, batch", CASES, ids=[f"n{n}" for n, _ in CASES])
@pytest.mark.parametrize("spectrum", ["random", "half rank", "identity"])
def test_svd(benchmark: Any, spectrum: str, n: int, batch: int, who: str, count: int) -> None:
    benchmark.group = f"svd {spectrum} float32 n={n} batch={batch}"
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0))
    if spectrum == "half rank":
        x = x[..., : n // 2] @ x[..., : n // 2].mT / n
    elif spectrum == "identity":
        x = torch.eye(n).repeat(batch, 1, 1)
    run = (lambda: torch.linalg.svd(x, full_matrices=False)) if who == "torch" else (lambda: fl.ops.svd(x))
    u, s, vh = run()
    require("svd", (u * s[..., None, :]) @ vh, x, 200 * torch.finfo(x.dtype).eps)
    time_it(benchmark, run, threads_used=count)
