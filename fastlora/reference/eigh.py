"""Symmetric eigendecomposition by LAPACK in float64, with the sign rule."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(values [..., n], vectors [..., n, n], info [...])`` of symmetric matrices, ascending, from the lower
    triangle."""
    lower = a.double().tril()
    bad = ~lower.isfinite().all(-1).all(-1)  # [...]
    values, vectors = torch.linalg.eigh(
        torch.where(bad[..., None, None], torch.eye(a.shape[-1], dtype=lower.dtype), lower)
    )
    vectors = vectors * largest_entry_sign(vectors, -2)
    nan = torch.full((), torch.nan, dtype=a.dtype)
    values = torch.where(bad[..., None], nan, values.to(a.dtype))
    vectors = torch.where(bad[..., None, None], nan, vectors.to(a.dtype))
    return values, vectors.mT.contiguous().mT, bad.int()


def largest_entry_sign(x: Tensor, dim: int) -> Tensor:
    """±1: the sign of the entry of largest magnitude along ``dim``, the first of equals."""
    entry = x.gather(dim, x.abs().argmax(dim, keepdim=True))
    return torch.where(entry < 0, -1.0, 1.0).to(x.dtype)
