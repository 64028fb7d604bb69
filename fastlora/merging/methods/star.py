"""STAR: the leading singular values of every update, at the size of all, arXiv 2502.10339."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import product_svd
from fastlora.merging.forms.shares import require_sum


@cores.method(
    summary="mean of the ΔWᵢ, each cut to a share of Σσ and scaled to the Σσ it had",
    source="STAR, arXiv 2502.10339",
    whole=True,
)
def star(stack: Tensor, sides: tuple[Tensor, Tensor], weights: Tensor, *, keep: float = 0.4) -> Tensor:
    """``Σ_i ω_i c_i U_q Σ_q V_qᵀ`` with ``ΔW_i = U Σ Vᵀ``, ``c_i = Σσ / Σ_{j≤q} σ_j`` and ``ω_i = w_i / Σ_j w_j``.

    ``q`` is the smallest count whose ``Σ_{j≤q} σ_j`` is at least ``keep·Σσ``; it differs between adapters. The paper's
    code finds the leading directions by a randomised decomposition; here they are exact. Cost: ``O(R r²)`` an adapter.

    Args:
        keep: share of the sum of the singular values that an update keeps, in (0, 1]
    """
    if not 0.0 < keep <= 1.0:
        raise InputError(f"star: keep={keep:g} must be above 0 and at most 1")
    U, sigma, V = product_svd(*sides)  # of w_i ΔW_i  [g, k, r]
    whole = sigma.sum(2, keepdim=True)
    before = sigma.cumsum(2) - sigma
    kept = sigma * (before < keep * whole * (1 - 1e-12))
    kept = kept * torch.where(whole > 0, whole / kept.sum(2, keepdim=True).clamp(min=1e-300), 0.0)
    return ((U * kept[:, :, None]) @ V.mT).sum(1) / require_sum("star", weights)
