"""The sum of updates at one norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.merging.forms import weights as form


@form.method(
    summary="Σ wᵢuᵢΔWᵢ, uᵢ ∝ 1/‖ΔWᵢ‖ over all modules, Σuᵢ = 1",
    source="our definition",
    over="pool",
)
def equal_energy(inner: Tensor, weights: Tensor) -> Tensor:
    """``c_i = w_i u_i`` with ``u_i = ‖ΔW_i‖⁻¹ / Σ_j ‖ΔW_j‖⁻¹``; norms are those of all modules together.

    ``inner [1, k, k]``: ``⟨ΔW_i, ΔW_j⟩``, ``weights [k]`` → ``c [1, k]``. Weights say how long the terms are relative
    to each other: with weights of 1 all have one norm. Updates that are zero, and those of weight 0, do not count. One
    adapter stays as it is.
    """
    norms = inner[0].diagonal().clamp(min=0).sqrt()
    inverse = torch.where((norms > 0) & (weights != 0), 1.0 / norms, 0.0)
    total = inverse.sum()
    return (weights * inverse / (total if float(total) > 0 else 1.0))[None]
