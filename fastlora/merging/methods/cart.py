"""CART: the mean, and the leading directions of what every update is beside it, arXiv 2412.12153."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import squares_of
from fastlora.merging.forms.frames import Cut
from fastlora.merging.forms.shares import require_sum


@cores.method(
    summary="mean W̄ + λ Σ wᵢ·(best rank-q approximation of ΔWᵢ − W̄)",
    source="CART, arXiv 2412.12153, with q relative to the rank of the pool",
    cost="Gram, iterated",
    whole=True,
)
def cart(stack: Tensor, weights: Tensor, noise: Cut, *, share: float = 0.04, strength: float = 1.0) -> Tensor:
    """``W̄ + λ Σ_i w_i T_q(ΔW_i − W̄)`` with ``W̄ = Σ w_i ΔW_i / Σ w_i`` and ``T_q`` the best approximation of rank
    ``q``.

    ``q = ⌈share·R'⌉``, where ``R'`` is the rank of all updates of the module side by side; the paper's is relative to
    ``min(n, m)``, where nothing would be cut of a LoRA update, and all that is beside the mean would cancel. An update
    that lacks the module is zero, and differs from the mean by ``−W̄``. One adapter, and copies of one, stay as they
    are. Cost: ``k`` eigendecompositions of ``R×R`` matrices a module.

    Args:
        share: rank of every difference, as a share of the rank of the pool in a module, in (0, 1]
        strength: λ, what the differences are multiplied by
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"cart: share={share:g} must be above 0 and at most 1")
    mean = stack.sum(1) / require_sum("cart", weights)  # [g, R, R]
    differences = stack - weights[:, None, None] * mean[:, None]
    sizes = ops.eigh(squares_of(stack)[0])[0].flip(-1).clamp(min=0).sqrt()
    q = (share * noise(sizes)).ceil()  # [g]
    vectors = ops.eigh(differences @ differences.mT)[1].flip(-1)  # [g, k, R, R]
    kept = vectors * (torch.arange(stack.shape[2]) < q[:, None])[:, None, None]
    return mean + strength * (kept @ (kept.mT @ differences)).sum(1)
