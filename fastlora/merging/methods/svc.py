"""SVC: singular values of the sum, lowered where updates are counted more than once, arXiv 2602.05536."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.frames import Cut


@cores.method(
    summary="λ Σ wᵢΔWᵢ = UΣVᵀ with σⱼ·K/Σᵢ max(α, sᵢⱼ), sᵢⱼ how much of wᵢΔWᵢ is there along uⱼ",
    source="SVC, arXiv 2602.05536, along the directions of the sum as in the paper",
    whole=True,
)
def svc(stack: Tensor, noise: Cut, *, strength: float = 0.3, alpha: float = 0.1) -> Tensor:
    """``Σ_j γ_j σ_j u_j v_jᵀ`` with ``λ Σ_i X_i = Σ_j σ_j u_j v_jᵀ``, ``X_i = w_i ΔW_i``.

    ``γ_j = K_j / Σ_i max(α, s_ij)`` and ``s_ij = ⟨a_j, a_ij⟩/‖a_ij‖²`` with the responses ``a_j = σ_j v_j`` and
    ``a_ij = X_iᵀ u_j``. The sum is over the ``K_j`` updates that have a response above the noise along ``u_j``. Where
    ``s`` is above ``α``, ``λ`` cancels: one adapter stays as it is, and copies of one give that one. Cost: one singular
    value decomposition of ``R×R`` a module and ``O(k R³)``.

    fusion_bench counts an update that is zero, too, as one with the share ``α``. Trap: directions of equal singular
    values are not unique, and the result is not either.

    Args:
        strength: λ, what the sum is multiplied by before its singular values are calibrated
        alpha: α, the least share that counts, above 0
    """
    if not alpha > 0:
        raise InputError(f"svc: alpha={alpha:g} must be above 0")
    U, sigma, Vt = ops.svd(strength * stack.sum(1))
    merged = sigma[:, :, None] * Vt  # a_j in rows  [g, R, R]
    responses = U.mT[:, None] @ stack  # [g, k, R, R]
    squares = responses.square().sum(3)
    floor = torch.maximum(noise.rtol * sigma[:, :1].sum(1), noise.floor)
    counted = squares > floor.square()[:, None, None]
    along = (responses * merged[:, None]).sum(3) / torch.where(counted, squares, 1.0)
    total = torch.where(counted, along.clamp(min=alpha), 0.0).sum(1)  # [g, R]
    factor = torch.where(total > 0, counted.sum(1) / torch.where(total > 0, total, 1.0), 1.0)
    return (U * (factor * sigma)[:, None]) @ Vt
