"""Thin singular value decomposition by LAPACK in float64, with the sign rule."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.reference.eigh import largest_entry_sign


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(U [..., p, m], σ [..., m], Vᵀ [..., m, q], info [...])`` of ``[..., p, q]`` with ``m = min(p, q)``."""
    x = a.double()
    bad = ~x.isfinite().all(-1).all(-1)  # [...]
    u, s, vh = torch.linalg.svd(torch.where(bad[..., None, None], 0.0, x), full_matrices=False)
    sign = largest_entry_sign(vh, -1)  # [..., m, 1]
    u, vh = u * sign.mT, vh * sign
    nan = torch.full((), torch.nan, dtype=a.dtype)
    u, vh = (torch.where(bad[..., None, None], nan, t.to(a.dtype)) for t in (u, vh))
    return u.mT.contiguous().mT, torch.where(bad[..., None], nan, s.to(a.dtype)), vh.contiguous(), bad.int()
