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
from fastlora.merging.forms import tile_rules
from fastlora.merging.forms.tile_rules import Between, Largest, Random, Ranked, Varied
from fastlora.ops.merge_tiles import bound_of, key_of
from fastlora.reference.merge_tiles import WORDS, variance
from fastlora.reference.philox import words

Rule = Literal[
    "sum", "magnitude", "breadcrumbs", "breadcrumbs_ties", "ties", "dare", "dare_ties", "della", "della_linear", "sce"
]

TRIMMED = ("magnitude", "breadcrumbs", "breadcrumbs_ties", "ties")
"""Rules that keep elements by their magnitude."""
WITHOUT_LARGEST = ("breadcrumbs", "breadcrumbs_ties")
RANKED = ("della", "della_linear")
ELECTED = ("breadcrumbs_ties", "ties", "dare_ties", "della")
"""Rules that take what has the elected sign."""

ALL = ("density", "gauge", "combine", "seed", "gamma", "epsilon", "select_topk")
USED: Mapping[str, tuple[str, ...]] = {
    "sum": (),
    "magnitude": ("density", "gauge"),
    "breadcrumbs": ("density", "gauge", "gamma"),
    "breadcrumbs_ties": ("density", "gauge", "gamma", "combine"),
    "ties": ("density", "gauge", "combine"),
    "dare": ("density", "gauge", "seed"),
    "dare_ties": ("density", "gauge", "seed", "combine"),
    "della": ("density", "gauge", "seed", "epsilon", "combine"),
    "della_linear": ("density", "gauge", "seed", "epsilon"),
    "sce": ("gauge", "select_topk"),
}
"""Which parameters of a container a rule uses; a sum is the same in all bases."""


def idle(values: Mapping[str, object]) -> dict[str, str]:
    """The parameters of a container that have no effect with its rule."""
    rule = str(values["rule"])
    return dict.fromkeys(sorted(set(ALL) - set(USED[rule])), f"rule={rule}")


# Elements are numbered as in rows of this length, so that directions that are zero for all shift nobody's mask.
ROW = 2**32
# A variance over adapters below its square, relative to the largest magnitude, is rounding: copies do not vary.
SAME = 1e-13

Combine = Literal["mean", "sum"]
Keys = tuple[Sequence[str], Sequence[str]]
"""The names of the adapters and of the modules."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What a rule has to know of all elements first.

    ``low``, ``high`` ``[g, k]``: kept is what is at least ``low`` and below ``high``. ``factors [g, k]``: what is left
    is multiplied by them. ``least [g]``: places whose variance is at least this are kept. ``energies [g, k]``: shares
    of the adapters.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    factors: Tensor | None = None
    least: Tensor | None = None
    energies: Tensor | None = None


def thresholds(elements: Tensor, counts: Tensor) -> Tensor:
    """The least of the ``counts [g]`` largest magnitudes in ``elements [g, N]``, infinity for a count of 0: ``[g]``."""
    length = elements.shape[-1]
    chosen = zip(elements.abs().numpy(), counts.tolist(), strict=True)
    least = [float(np.partition(row, length - c)[length - c]) if c else np.inf for row, c in chosen]
    return torch.tensor(least, dtype=torch.float64)


def taking_part(weights: Sequence[float]) -> list[int]:
    """The adapters whose weight is not 0; the first where none is."""
    return [i for i, weight in enumerate(weights) if weight != 0.0] or [0]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A rule with its parameters; ``method`` is for messages.

    Elements are those of the weighted updates. What is kept of them, ``v_i``:

    * ``sum``: all. ``magnitude``, ``ties``: the ``⌊density·N⌋`` largest of every adapter, of equals all.
    * ``breadcrumbs``, ``breadcrumbs_ties``: as many, those that follow the ``⌊gamma·N⌋`` largest.
    * ``dare``, ``dare_ties``: each with the probability ``density``, divided by it.
    * ``della``, ``della_linear``: each with a probability from ``density − epsilon``, for the least of its row, to
      ``density + epsilon``, for the largest; ``v_i`` gets the sum of magnitudes that ``x_i`` had.
    * ``sce``: the places with the ``⌊select_topk·V⌋`` largest variances over the adapters, of ``V`` that have one.

    Then ``Σ v_i``; or with ``ties``, ``breadcrumbs_ties``, ``dare_ties`` and ``della`` the mean (over their number, not
    over weights) or the sum of those that are not zero and have the sign of ``Σ v_i``, plus where it is zero; with
    ``sce`` their mean weighted by the ``‖v_i‖²``.
    """

    method: str
    rule: Rule
    density: float
    combine: Combine
    seed: int
    gamma: float
    epsilon: float
    select_topk: float

    def __post_init__(self) -> None:
        for name, share in (("density", self.density), ("select_topk", self.select_topk)):
            if not 0.0 < share <= 1.0:
                raise InputError(f"{self.method}: {name}={share:g} must be above 0 and at most 1")
        if not 0.0 <= self.gamma < 1.0:
            raise InputError(f"{self.method}: gamma={self.gamma:g} must be at least 0 and below 1")
        least, most = self.density - self.epsilon, self.density + self.epsilon
        if self.rule in RANKED and not (self.epsilon >= 0.0 <= least and most <= 1.0):
            raise InputError(
                f"{self.method}: density={self.density:g} ± epsilon={self.epsilon:g} must lie in [0, 1]; lower epsilon"
            )

    def tile_rule(self) -> tile_rules.Rule:
        """The same rule for the op ``merge_tiles``, whose elements have the weights inside. Random words there are
        numbered as in rows of the length of the module."""
        density, epsilon = self.density, self.epsilon
        trims: dict[str, tile_rules.Trimming] = {
            **dict.fromkeys(("magnitude", "ties"), Largest(density, all_equals=True)),
            **dict.fromkeys(WITHOUT_LARGEST, Between(density, self.gamma, all_equals=True)),
            **dict.fromkeys(("dare", "dare_ties"), Random(density, self.seed)),
            **dict.fromkeys(RANKED, Ranked(density, epsilon, self.seed)),
            "sce": Varied(self.select_topk, all_equals=True, same=SAME),
        }
        elected = self.rule in ELECTED
        return tile_rules.Rule(
            trim=trims.get(self.rule),
            rescale="density" if isinstance(trims.get(self.rule), Random) else "l1" if self.rule in RANKED else "none",
            elect="total" if elected or self.rule == "sce" else "none",
            divide="weights" if self.rule == "sce" else "count" if elected and self.combine == "mean" else "none",
            weigh="energy" if self.rule == "sce" else "given",
            floor=0.0,
        )

    def in_frames(
        self,
        sides: tuple[Tensor, Tensor],
        left: Tensor,
        right: Tensor,
        counts: tuple[Tensor, Tensor],
        weights: Tensor,
        keys: Keys,
    ) -> Tensor:
        """``left · rule(leftᵀ M_i right) · rightᵀ`` of ``M_i = L_i R_iᵀ``.

        ``left``, ``right``: orthonormal, ``[g, R, c]``. ``sides``: ``L``, ``R`` ``[g, k, R, r]``, with the ``weights
        [k]`` inside. ``counts [g]`` twice: how many of the first columns of each are directions that some update has.
        """
        chosen = taking_part(weights.tolist())
        L, R = (side[:, chosen] for side in sides)
        inside = (left.mT[:, None] @ L) @ (right.mT[:, None] @ R).mT
        names = [keys[0][i] for i in chosen]
        return left @ self.merged(inside, counts, (names, keys[1])) @ right.mT

    def merged(self, x: Tensor, counts: tuple[Tensor, Tensor], keys: Keys) -> Tensor:
        """What the rule makes of the ``x_i``, ``[g, k, p, q]``: ``[g, p, q]``.

        ``counts [g]`` twice: how many of the first rows and columns are not rounding; shares and ranks count those.
        """
        known = self._measured(x, counts, keys)
        return self._combined(self._kept(x, known, counts[1], keys), known)

    def _measured(self, x: Tensor, counts: tuple[Tensor, Tensor], keys: Keys) -> Measured:
        sizes = (counts[0] * counts[1]).double()
        if self.rule in TRIMMED:
            kept = (self.density * sizes).long()
            top = torch.minimum((self.gamma * sizes).long(), sizes.long() - kept)
            without = self.rule in WITHOUT_LARGEST
            found = [
                (thresholds(one, top + kept), thresholds(one, top)) if without else (thresholds(one, kept),)
                for one in x.flatten(2).unbind(1)
            ]
            low, *high = (torch.stack(list(rows), 1) for rows in zip(*found, strict=True))
            return Measured(low, high[0] if high else None)
        if self.rule in RANKED:
            whole = x.abs().sum((-2, -1))
            left = self._kept(x, Measured(), counts[1], keys).abs().sum((-2, -1))
            return Measured(factors=torch.where(left > 0, whole / torch.where(left > 0, left, 1.0), 1.0))
        if self.rule == "sce":
            return self._of_energies(x, counts, keys)
        return Measured()

    def _of_energies(self, x: Tensor, counts: tuple[Tensor, Tensor], keys: Keys) -> Measured:
        least = None
        if self.select_topk < 1.0:
            varied = _varied(x)
            largest = x.abs().amax((1, 2, 3)) if x.numel() else x.new_zeros(len(x))
            rows, columns = (
                torch.arange(length) < count[:, None] for length, count in zip(varied.shape[1:], counts, strict=True)
            )
            there = rows[:, :, None] & columns[:, None] & (varied > (SAME * largest).square()[:, None, None])
            varied = torch.where(there, varied, 0.0).flatten(1)
            least = thresholds(varied, (self.select_topk * there.sum((1, 2)).double()).long())
        squares = self._kept(x, Measured(least=least), counts[1], keys).square().sum((-2, -1))
        total = squares.sum(1, keepdim=True)
        return Measured(
            least=least, energies=torch.where(total > 0, squares / torch.where(total > 0, total, 1.0), 1 / len(keys[0]))
        )

    def _kept(self, x: Tensor, known: Measured, widths: Tensor, keys: Keys) -> Tensor:
        """The ``v_i`` of the ``x_i``."""
        if known.low is not None:
            sizes = x.abs()
            inside = sizes >= known.low[..., None, None]
            if known.high is not None:
                inside &= sizes < known.high[..., None, None]
            return torch.where(inside, x, 0.0)
        if known.least is not None:
            return torch.where((_varied(x) >= known.least[:, None, None])[:, None], x, 0.0)
        if self.rule in RANKED:
            left = torch.where(_drawn(x, self._bounds(x, widths), self.seed, keys), x, 0.0)
            return left if known.factors is None else left * known.factors[..., None, None]
        if self.rule in ("dare", "dare_ties"):
            bounds = torch.tensor(bound_of(self.density))
            return torch.where(_drawn(x, bounds, self.seed, keys), x / self.density, 0.0)
        return x

    def _bounds(self, x: Tensor, widths: Tensor) -> Tensor:
        """The probabilities of DELLA, of 2³², by the rank of an element in its row: int64, like ``x``."""
        q = x.shape[-1]
        ranks = x.abs().sort(dim=-1, stable=True).indices.argsort(-1)
        ranks = (ranks - (q - widths)[:, None, None, None]).clamp(min=0)
        share = self.density - self.epsilon + 2 * self.epsilon * ranks / (widths - 1).clamp(min=1)[:, None, None, None]
        return (share * WORDS).floor().clamp(0, WORDS).long()

    def _combined(self, v: Tensor, known: Measured) -> Tensor:
        """``[g, k, rows, q]`` → ``[g, rows, q]``."""
        total = v.sum(-3)
        if self.rule not in ELECTED and known.energies is None:
            return total
        agree = v * torch.where(total < 0, -1.0, 1.0)[..., None, :, :] > 0
        if known.energies is not None:
            shares = torch.where(agree, known.energies[..., None, None], 0.0)
            divisor = shares.sum(-3)
            return (v * shares).sum(-3) / torch.where(divisor > 0, divisor, 1.0)
        chosen = torch.where(agree, v, 0.0).sum(-3)
        return chosen / agree.sum(-3).clamp(min=1) if self.combine == "mean" else chosen


def _varied(x: Tensor) -> Tensor:
    """The variance over the adapters: ``[g, k, rows, q]`` → ``[g, rows, q]``."""
    return variance(x.transpose(0, 1))


def _drawn(x: Tensor, bounds: Tensor, seed: int, keys: Keys) -> Tensor:
    """Which elements of ``x [g, k, p, q]`` stay: those whose random word is below its bound.

    Words depend on the seed, the names of adapter and module, and the place: not on the pool.
    """
    _, _, p, q = x.shape
    names, modules = keys
    numbers = np.arange(p, dtype=np.int64)[:, None] * ROW + np.arange(q, dtype=np.int64)
    drawn = [
        np.stack([words(numbers, key_of(seed, name), key_of(module)) for name in names]).astype(np.int64)
        for module in modules
    ]
    return torch.from_numpy(np.stack(drawn)) < bounds
