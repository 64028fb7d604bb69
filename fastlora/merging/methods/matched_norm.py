"""The sum at the mean norm of the updates."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import weights

# A sum that is shorter than its terms by this factor has no direction that could be scaled.
CANCELLED = 1e-6


@weights.method(
    summary="c Σ wᵢΔWᵢ, c = mean‖wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖ over all modules",
    source="our definition; the γ of Pico, arXiv 2604.16826",
    over="pool",
)
def matched_norm(inner: Tensor) -> Tensor:
    """``c = (1/k) Σ_i ‖X_i‖ / ‖Σ_i X_i‖`` for ``X_i = w_i ΔW_i``; norms are those of all modules together.

    ``inner [1, k, k]``: ``⟨X_i, X_j⟩`` → ``c`` for all, ``[1, k]``. ``c`` is ``1/k`` for copies of one update and
    ``1/√k`` for orthogonal ones of one norm. Updates that are zero, or have the weight 0, do not count in the mean. One
    adapter stays as it is.

    Raises :class:`InputError` where the updates cancel each other.
    """
    norms = inner[0].diagonal().clamp(min=0).sqrt()
    total = inner.sum().clamp(min=0).sqrt()
    if bool(norms.any()) and float(total) <= CANCELLED * float(norms.sum()):
        raise InputError(
            "matched_norm: needs a sum that is not zero, but these adapters cancel each other; use 'equal_energy' or "
            "weights of your own"
        )
    mean = norms.sum() / (norms > 0).sum().clamp(min=1)
    return torch.where(norms > 0, mean / total, 0.0)[None]
