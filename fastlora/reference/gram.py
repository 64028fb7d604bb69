"""Gram blocks by definition."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(factors: Tensor, ranks: Tensor | None, blocks: list[tuple[int, int]], mirror: bool, rows: bool) -> Tensor:
    """``X_iᵀX_j [..., k, k, r, r]`` in float64 for the ``blocks`` (and their mirrors), zeros elsewhere."""
    x = factors.double().mT if rows else factors.double()  # [..., k, n, r]
    x = mask_columns(x, ranks)
    *batch, k, _, r = x.shape
    products = torch.einsum("...ina,...jnb->...iajb", x, x).reshape(*batch, k * r, k * r)
    full = symmetric(products).reshape(*batch, k, r, k, r).transpose(-3, -2)  # [..., k, k, r, r]
    wanted = torch.zeros(x.shape[-3], x.shape[-3], dtype=torch.bool, device=x.device)
    for i, j in blocks:
        wanted[i, j] = True
        wanted[j, i] |= mirror
    return torch.where(wanted[:, :, None, None], full, 0.0).contiguous()


def symmetric(x: Tensor) -> Tensor:
    """The upper triangle in both: a library may sum ``X_aᵀX_b`` and ``X_bᵀX_a`` in different orders."""
    upper = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu()
    return torch.where(upper, x, x.mT)


def mask_columns(x: Tensor, ranks: Tensor | None) -> Tensor:
    """Zeros in place of padding columns: ``x [..., k, n, r]``, ``ranks [..., k]``."""
    if ranks is None:
        return x
    column = torch.arange(x.shape[-1], device=x.device)
    return torch.where(column < ranks[..., None, None], x, 0.0)
