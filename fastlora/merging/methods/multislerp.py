"""Multi-SLERP: the mean direction of any number of updates, in every module by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.merging.forms import weights as form
from fastlora.merging.forms.shares import shares

# Directions whose weighted mean is shorter have none: mergekit's bound.
SHORTEST = 1e-8


@form.method(
    summary="mean direction of the ΔWᵢ at their mean norm: (Σωᵢ‖ΔWᵢ‖)·û, û ∝ Σωᵢ ΔWᵢ/‖ΔWᵢ‖, ω = w/Σw",
    source="mergekit's `multislerp`, with the base at 0",
)
def multislerp(inner: Tensor, weights: Tensor) -> Tensor:
    """``(Σ_i ω_i ‖ΔW_i‖) û`` with ``û = m/‖m‖``, ``m = Σ_i ω_i ΔW_i/‖ΔW_i‖`` and ``ω_i = w_i / Σ_j w_j``.

    ``inner [g, k, k]``: ``⟨ΔW_i, ΔW_j⟩``, ``weights [k]`` → ``c [g, k]``. mergekit's step into the tangent space at
    ``û`` and back adds nothing: the weighted mean of the tangents is zero by the choice of ``û``.

    One adapter, and copies of one, stay as they are. Where the directions balance out there is no ``û``, and the result
    is the weighted mean ``Σ ω_i ΔW_i`` (mergekit's rule for two; it refuses more). An update that is zero, or lacks the
    module, has no direction, and counts in the mean norm.
    """
    part = shares("multislerp", weights)  # [k]
    norms = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # [g, k]
    along = torch.where(norms > 0, part / norms, 0.0)
    length = torch.einsum("gi,gij,gj->g", along, inner, along).clamp(min=0).sqrt()[:, None]
    mean_norm = (part * norms).sum(1, keepdim=True)
    return torch.where(length > SHORTEST, along * mean_norm / length, torch.where(norms > 0, part, 0.0))
