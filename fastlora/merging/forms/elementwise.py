"""Rules on the elements of small matrices, for containers: what stands in common coordinates is merged element by
element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops.merge_tiles import bound_of, key_of
from fastlora.reference.philox import words

Rule = Literal["sum", "magnitude", "ties", "dare", "dare_ties"]

RANDOM = ("dare", "dare_ties")

USED: Mapping[str, tuple[str, ...]] = {
    "sum": (),
    "magnitude": ("density", "gauge"),
    "ties": ("density", "gauge", "combine"),
    "dare": ("density", "gauge", "seed"),
    "dare_ties": ("density", "gauge", "seed", "combine"),
}
"""Which parameters of a container a rule uses; a sum is the same in all bases."""


def idle(values: Mapping[str, object]) -> dict[str, str]:
    """The parameters of a container that have no effect with its rule."""
    rule = str(values["rule"])
    return dict.fromkeys(sorted(set(USED["dare_ties"]) - set(USED[rule])), f"rule={rule}")


# Elements are numbered as in rows of this length, so that directions that are zero for all shift nobody's mask.
ROW = 2**32

Combine = Literal["mean", "sum"]


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


def dropped(
    stack: Tensor, names: Sequence[str], module: str, seed: int, density: float, first_column: int = 0
) -> Tensor:
    """DARE of the ``x_i [k, p, q]`` of one module: every element stays with the probability ``density``, divided by it.

    Which ones stay depends on the seed, the names of adapter and module, and the place: not on the pool. The columns
    are those from ``first_column`` on.
    """
    p, q = stack.shape[1:]
    rows, columns = np.arange(p, dtype=np.int64)[:, None], np.arange(first_column, first_column + q, dtype=np.int64)
    numbers, bound = rows * ROW + columns, bound_of(density)
    kept = [words(numbers, key_of(seed, name), key_of(module)).astype(np.int64) < bound for name in names]
    return torch.where(torch.from_numpy(np.stack(kept)), stack / density, 0.0)


def merged(stack: Tensor, threshold: Tensor | None, rule: Rule, combine: Combine) -> Tensor:
    """What a rule makes of ``stack [..., k, p, q]``: ``[..., p, q]``.

    ``sum``, ``dare`` (of what is left): the sum. ``magnitude``: the sum of the elements of at least ``threshold
    [..., k]``. ``ties``: of these, ``dare_ties``: of all, the mean (over their number, not over weights) or the sum of
    those that are not zero and have the sign of their sum, plus where it is zero.
    """
    if rule in ("sum", "dare"):
        return stack.sum(-3)
    kept = stack if threshold is None else torch.where(stack.abs() >= threshold[..., None, None], stack, 0.0)
    total = kept.sum(-3)
    if rule == "magnitude":
        return total
    agree = kept * torch.where(total < 0, -1.0, 1.0)[..., None, :, :] > 0
    chosen = torch.where(agree, kept, 0.0).sum(-3)
    return chosen / agree.sum(-3).clamp(min=1) if combine == "mean" else chosen


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A rule with its parameters; ``method`` is for messages."""

    method: str
    rule: Rule
    density: float
    combine: Combine
    seed: int

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise InputError(f"{self.method}: density={self.density:g} must be above 0 and at most 1")

    @property
    def trims(self) -> bool:
        """Whether it keeps the largest elements."""
        return self.rule in ("magnitude", "ties")

    def thresholds(self, elements: Tensor, sizes: Tensor) -> Tensor | None:
        """:func:`thresholds`, where the rule trims."""
        return thresholds(elements, sizes, self.density) if self.trims else None

    def of(
        self, stack: Tensor, threshold: Tensor | None, names: Sequence[str], module: str, first_column: int = 0
    ) -> Tensor:
        """``[p, q]`` of the ``x_i [k, p, q]`` of one module, whose columns are those from ``first_column`` on."""
        if self.rule in RANDOM:
            stack = dropped(stack, names, module, self.seed, self.density, first_column)
        return merged(stack, threshold, self.rule, self.combine)

    def in_frames(
        self,
        sides: tuple[Tensor, Tensor],
        left: Tensor,
        right: Tensor,
        sizes: Tensor,
        keys: tuple[Sequence[str], Sequence[str]],
    ) -> Tensor:
        """``left · rule(leftᵀ M_i right) · rightᵀ`` of ``M_i = L_i R_iᵀ``.

        ``left``, ``right``: orthonormal, ``[g, R, c]``. ``sides``: ``L``, ``R`` ``[g, k, R, r]``. ``sizes [g]``: how
        many coordinates are not zero for all. ``keys``: names of the adapters and of the modules.
        """
        inside = (left.mT[:, None] @ sides[0]) @ (right.mT[:, None] @ sides[1]).mT
        threshold = self.thresholds(inside.flatten(2), sizes[:, None].expand(inside.shape[:2]))
        if self.rule in RANDOM:
            names, modules = keys
            inside = torch.stack([
                dropped(x, names, module, self.seed, self.density) for x, module in zip(inside, modules, strict=True)
            ])  # fmt: skip
        return left @ merged(inside, threshold, self.rule, self.combine) @ right.mT
