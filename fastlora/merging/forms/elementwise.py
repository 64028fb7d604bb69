"""Rules on the elements of small matrices, for containers: what stands in common coordinates is merged element by
element."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastlora.errors import InputError

Rule = Literal["sum", "magnitude", "ties"]

Combine = Literal["mean", "sum"]


def check_density(method: str, density: float) -> None:
    """Raises unless it is the share of something."""
    if not 0.0 < density <= 1.0:
        raise InputError(f"{method}: density={density:g} must be above 0 and at most 1")


def thresholds(elements: Tensor, sizes: Tensor, density: float) -> Tensor:
    """The magnitude of the ``⌊density·size⌋``-th largest element, infinity for a count of 0: ``[…]``.

    ``elements [..., N]``, ``sizes [...]``: how many of the ``N`` count; the others are zero.
    """
    counts = (density * sizes).long()
    magnitudes = elements.abs()
    if not magnitudes.shape[-1]:
        return torch.full(counts.shape, torch.inf, dtype=torch.float64)
    first = int(counts.flatten()[0]) if counts.numel() else 0
    if first and bool((counts == first).all()):  # faster than to sort, and the same number
        return magnitudes.kthvalue(magnitudes.shape[-1] - first + 1, dim=-1).values
    ordered = magnitudes.sort(dim=-1, descending=True).values
    chosen = ordered.gather(-1, (counts - 1).clamp(min=0)[..., None])[..., 0]
    return torch.where(counts > 0, chosen, torch.inf)


def merged(stack: Tensor, threshold: Tensor | None, rule: Rule, combine: Combine) -> Tensor:
    """What a rule makes of ``stack [..., k, p, q]``: ``[..., p, q]``.

    ``sum``: the sum. ``magnitude``: the sum of the elements of at least ``threshold [..., k]``. ``ties``: of these, the
    mean (over their number, not over weights) or the sum of those that are not zero and have the sign of their sum,
    plus where it is zero.
    """
    if rule == "sum" or threshold is None:
        return stack.sum(-3)
    kept = torch.where(stack.abs() >= threshold[..., None, None], stack, 0.0)
    total = kept.sum(-3)
    if rule == "magnitude":
        return total
    agree = kept * torch.where(total < 0, -1.0, 1.0)[..., None, :, :] > 0
    chosen = torch.where(agree, kept, 0.0).sum(-3)
    return chosen / agree.sum(-3).clamp(min=1) if combine == "mean" else chosen


def in_frames(
    sides: tuple[Tensor, Tensor],
    left: Tensor,
    right: Tensor,
    sizes: Tensor,
    rule: Rule,
    density: float,
    combine: Combine,
) -> Tensor:
    """``left · rule(leftᵀ M_i right) · rightᵀ`` of ``M_i = L_i R_iᵀ`` in orthonormal ``left``, ``right`` ``[g, R, c]``.

    ``sides``: ``L``, ``R`` ``[g, k, R, r]``. ``sizes [g]``: how many coordinates are not zero for all."""
    inside = (left.mT[:, None] @ sides[0]) @ (right.mT[:, None] @ sides[1]).mT
    threshold = None
    if rule != "sum":
        threshold = thresholds(inside.flatten(2), sizes[:, None].expand(inside.shape[:2]), density)
    return left @ merged(inside, threshold, rule, combine) @ right.mT
