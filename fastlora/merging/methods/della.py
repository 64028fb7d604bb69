"""DELLA, arXiv 2406.11617: elements are dropped at random, the smaller ones of a row more often."""

from __future__ import annotations

from typing import Literal

from fastlora.errors import InputError
from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Ranked, Rule, check_share


@tiles.rule(
    summary="elementwise: mean of elements kept at random by their rank in the row, rescaled, with elected signs",
    source="DELLA, arXiv 2406.11617; mergekit's della and della_linear",
)
def della(
    *,
    density: float,
    epsilon: float = 0.15,
    elect: Literal["none", "total", "frequency"] = "total",
    combine: Literal["mean", "sum"] = "mean",
    seed: int = 0,
) -> Rule:
    """``Σ_i w_i v_i / Σ w_i`` over the adapters that have the elected sign; ``v_i = c_i m_i ∘ ΔW_i``.

    An element stays with a probability that rises with the rank of its magnitude in its row, from ``density − epsilon``
    to ``density + epsilon``; ``c_i`` restores the sum of magnitudes of a module, as in mergekit. Votes are weighted.
    Masks are as those of `dare`. Rows are sorted, so this costs more than other rules.

    Args:
        density: the mean probability of an element to stay
        epsilon: half the span of the probabilities; density ± epsilon must lie in [0, 1]
        elect: what elects a sign: the sum of values (total), of signs (frequency), or nothing (della_linear)
        combine: the weighted mean of what agrees, or its sum
        seed: which masks
    """
    check_share("della", "density", density)
    if epsilon < 0 or density - epsilon < 0 or density + epsilon > 1:
        raise InputError(f"della: density={density:g} ± epsilon={epsilon:g} must lie in [0, 1]; lower epsilon")
    divide: Literal["weights", "none"] = "weights" if combine == "mean" else "none"
    return Rule(Ranked(density, epsilon, seed), "l1", elect=elect, votes="weighted", divide=divide)
