"""Model stock, arXiv 2403.19522: the mean, the shorter the less the updates agree."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.merging.forms import weights


@weights.method(
    summary="t · mean(wᵢΔWᵢ), t = kc/(1 + (k−1)c), c the mean cosine",
    source="Model Stock, arXiv 2403.19522; mergekit's `model_stock`",
)
def model_stock(inner: Tensor) -> Tensor:
    """``(t/k) Σ_i X_i`` with ``t = kc/(1 + (k−1)c)``, ``c`` the mean of ``cos(X_i, X_j)`` over all pairs of a module.

    ``inner [g, k, k]``: ``⟨X_i, X_j⟩`` of the ``X_i = w_i ΔW_i`` → ``c [g, k]``. ``k`` counts the updates of a module
    that are not zero. One update, and copies of one, stay as they are.

    Trap: updates that are nearly orthogonal, as those of independently trained LoRA adapters are, give ``t ≈ 0``, and
    next to nothing is left. ``c < 0`` gives 0, where the formula would turn all updates around.
    """
    norms = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # [g, k]
    count = (norms > 0).sum(1).clamp(min=1).double()
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
    cosines = inner * inverse[:, :, None] * inverse[:, None]
    pairs = count * (count - 1)
    off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    cosine = torch.where(pairs > 0, off / pairs.clamp(min=1), 1.0).clamp(0.0, 1.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return (ratio / count)[:, None].expand_as(norms).contiguous()
