"""Batches of small matrices against torch.linalg."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.contest import OURS, Contest, Task, require
from fastlora.bench.timing import Contender, thread_counts

TORCH = "torch.linalg"


def gram(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Gram matrices of random factors ``[n, 2n]``."""
    x = torch.randn(batch, n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x @ x.mT


def clusters(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Half of the eigenvalues 1, half 2."""
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.linalg.qr(x)[0]
    values = torch.ones(n, dtype=torch.float64)
    values[n // 2 :] = 2
    a: Tensor = (q * values) @ q.mT
    return (0.5 * (a + a.mT)).to(dtype)


def identity(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Identities ``[batch, n, n]``."""
    return torch.eye(n, dtype=dtype).expand(batch, n, n).contiguous()


# Operations / n³: the tridiagonal form, divide and conquer, and multiplying the vectors back; the second is left out
# where values cluster and it may not be needed, and the identity needs none of this. SVD: that, AᵀA, A·V and a check.
SPECTRA: dict[str, tuple[Callable[[int, int, torch.dtype], Tensor], float]] = {
    "Gram": (gram, 14 / 3),
    "two clusters": (clusters, 10 / 3),
    "identity": (identity, 0.0),
}

SIZES = ((8, 1792), (16, 1792), (32, 1792), (64, 1792), (128, 64), (256, 64))
EASY_SIZES = ((16, 1792), (32, 1792), (128, 64))


def eigh() -> list[Contest]:
    """The contests of eigendecompositions against torch, by spectrum, dtype and size."""
    inputs = [("Gram", d, n, b) for d in (torch.float32, torch.float64) for n, b in SIZES]
    inputs += [(s, torch.float32, n, b) for s in ("two clusters", "identity") for n, b in EASY_SIZES]
    return [
        Contest(f"eigh {str(d)[6:]} n={n}, batch {b}, {s}", (TORCH,), partial(_prepare_eigh, s, n, b, d))
        for s, d, n, b in inputs
    ]


def _prepare_eigh(spectrum: str, n: int, batch: int, dtype: torch.dtype) -> Task:
    make, operations = SPECTRA[spectrum]
    a = make(n, batch, dtype)
    values, vectors = fl.ops.eigh(a)
    tolerance = 200 * torch.finfo(dtype).eps
    require("eigh", (vectors * values[..., None, :]) @ vectors.mT, a, tolerance)
    require("eigh: orthogonality", vectors.mT @ vectors, identity(n, batch, dtype), tolerance)
    contenders = {
        OURS: Contender(partial(fl.ops.eigh, a), thread_counts()),
        TORCH: Contender(partial(torch.linalg.eigh, a), thread_counts()),
    }
    return Task(contenders, 2 * a.nbytes, {dtype: operations * n**3 * batch})


def svd() -> list[Contest]:
    """The contests of singular value decompositions against torch, by size."""
    sizes = ((8, 1792), (16, 1792), (32, 1792), (64, 448), (128, 64))
    return [Contest(f"svd float32 n={n}, batch {b}", (TORCH,), partial(_prepare_svd, n, b)) for n, b in sizes]


def _prepare_svd(n: int, batch: int) -> Task:
    a = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0))
    u, s, vh = fl.ops.svd(a)
    tolerance = 200 * torch.finfo(a.dtype).eps
    require("svd", (u * s[..., None, :]) @ vh, a, tolerance)
    require("svd: orthogonality", vh @ vh.mT, identity(n, batch, a.dtype), tolerance)
    contenders = {
        OURS: Contender(partial(fl.ops.svd, a), thread_counts()),
        TORCH: Contender(partial(torch.linalg.svd, a, full_matrices=False), thread_counts()),
    }
    return Task(contenders, 3 * a.nbytes, {a.dtype: 9 * n**3 * batch})
