"""TIES, arXiv 2306.01708: trim, elect signs, average what agrees."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import tiles
from fastlora.merging.forms.tiles import Tiles
from fastlora.reference.tiles import kth_magnitudes


def thresholds(module: Tiles, *, density: float) -> Tensor:
    """The magnitude of the last element that every adapter keeps in a module: ``[k]``."""
    if not 0.0 < density <= 1.0:
        raise InputError(f"ties: density={density:g} must be above 0 and at most 1")
    n, m = module.shape
    return kth_magnitudes(module, [int(density * n * m)] * len(module.factors))


@tiles.method(
    summary="elementwise: the largest wᵢΔWᵢ, elected signs, mean of those that agree",
    source="TIES-Merging, arXiv 2306.01708, trimmed in every module by itself",
    measure=thresholds,
)
def ties(
    weighted: Tensor, threshold: Tensor, *, density: float = 0.2, combine: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Elements of ``ΔW``, each by itself.

    Trim: every adapter keeps its ``⌊density·n·m⌋`` largest magnitudes of a module, and all that are equal to the last
    of them. Elect: the sign of the sum of what is kept of the ``w_i ΔW_i``, plus where it is zero. Merge: the mean, or
    the sum, of the kept elements that are not zero and have this sign; zero where there is none.

    The paper trims all modules together; its mean counts adapters, as here, not weights.

    Args:
        density: share of the elements of a module that every adapter keeps, in (0, 1]
        combine: what is taken of the elements that agree, their mean or their sum
    """
    kept = torch.where(weighted.abs() >= threshold.to(weighted.device)[:, None, None], weighted, 0.0)
    elected = torch.where(kept.sum(0) < 0, -1.0, 1.0)
    agree = kept * elected > 0
    total = torch.where(agree, kept, 0.0).sum(0)
    return total / agree.sum(0).clamp(min=1) if combine == "mean" else total
