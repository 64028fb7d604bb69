"""Iso-C: the sum with a flat spectrum, arXiv 2502.04959, restricted to the rank that the sum has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.merging.forms import cores
from fastlora.merging.forms.frames import Cut


@cores.method(
    summary="Σ wᵢΔWᵢ = UΣVᵀ with equal singular values, mean(σ)·UVᵀ",
    source="Iso-C, arXiv 2502.04959, restricted to the directions that are kept",
)
def iso_c(weighted: Tensor, cut: Cut) -> Tensor:
    """``σ̄ U_q V_qᵀ``, where ``U_q Σ_q V_qᵀ`` is the best approximation of ``Σ w_i ΔW_i`` and ``σ̄`` the mean of ``Σ_q``.

    The rank or the energy says how many directions ``q`` are kept, before the spectrum becomes flat: afterwards no
    direction is larger than another. All ``min(n, m)`` directions, as for full matrices in the paper, would be
    directions of rounding.
    """
    U, sigma, Vt = ops.svd(weighted.sum(1))
    count = cut(sigma)[:, None]
    kept = torch.arange(sigma.shape[1]) < count  # [g, R]
    mean = (sigma * kept).sum(1, keepdim=True) / count.clamp(min=1)
    return (U * (kept * mean)[:, None]) @ Vt
