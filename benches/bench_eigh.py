"""Batched eigendecomposition against torch.linalg.eigh, which is fastest on one thread for small matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import require, time_it

import fastlora as fl

SPECTRA = ["gram", "clusters", "identity"]
CASES = [(8, 1792), (16, 1792), (32, 1792), (64, 1792), (128, 64), (256, 64)]


def matrices(spectrum: str, n: int, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """[batch, n, n]: random Gram matrices, projectors on half the space (eigenvalues 0 and 1), or identities."""
    generator = torch.Generator().manual_seed(0)
    if spectrum == "identity":
        return torch.eye(n, dtype=dtype).repeat(batch, 1, 1)
    if spectrum == "gram":
        x = torch.randn(batch, n, 2 * n, generator=generator, dtype=dtype)
    else:
        x = torch.linalg.qr(torch.randn(batch, n, n // 2, generator=generator, dtype=torch.float64))[0]
    return (x @ x.mT).to(dtype)


@pytest.mark.parametrize(
    "who, count", [("torch", 1), ("fastlora", 1), ("fastlora", 2)], ids=["torch-1", "fastlora-1", "fastlora-2"]
)
@pytest.mark.parametrize("n, batch", CASES, ids=[f"n{n}" for n, _ in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigh(benchmark: Any, spectrum: str, dtype: torch.dtype, n: int, batch: int, who: str, count: int) -> None:
    benchmark.group = f"eigh {spectrum} {str(dtype)[6:]} n={n} batch={batch}"
    a = matrices(spectrum, n, batch, dtype)
    run = torch.linalg.eigh if who == "torch" else fl.ops.eigh
    values, vectors = run(a)
    require("eigh", (vectors * values[..., None, :]) @ vectors.mT, a, 200 * torch.finfo(dtype).eps)
    time_it(benchmark, lambda: run(a), threads_used=count)
