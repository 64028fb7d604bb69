"""DARE, arXiv 2311.03099: elements are dropped at random, and the others made larger."""

from __future__ import annotations

from typing import Literal

from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Random, Rule, check_share


@tiles.rule(
    summary="elementwise: Σ wᵢ of randomly kept elements of each ΔWᵢ, rescaled; signs may be elected",
    source="DARE, arXiv 2311.03099; PEFT's dare_linear_svd and dare_ties_svd, mergekit's dare_linear and dare_ties",
)
def dare(
    *,
    density: float,
    elect: Literal["none", "total", "frequency"] = "none",
    convention: Literal["peft", "mergekit"] = "peft",
    seed: int = 0,
) -> Rule:
    """``Σ_i w_i v_i`` with ``v_i = c_i m_i ∘ ΔW_i``, where every element of the mask ``m_i`` is 1 with the probability
    ``density``, by itself.

    Its mean over seeds is the sum ``Σ w_i ΔW_i``, and its noise ``√((1 − d)/d)·‖ΔW‖``: a low rank of it is a noisy
    sum. ``peft``: ``c_i = 1/density``, and with elected signs the mean over the adapters that agree. ``mergekit``:
    ``c_i`` restores the sum of magnitudes of a module, votes are weighted, and what agrees is summed.

    Masks depend on the seed, the adapter's and the module's name and the place of an element, and on nothing else: not
    on the order of the pool, threads or devices. torch's own random numbers cannot be matched.

    Args:
        density: the probability of an element to stay, in (0, 1]
        elect: whether signs are elected as in TIES: none, by the sum of values (total) or of signs (frequency)
        convention: whose details: peft or mergekit
        seed: which masks
    """
    check_share("dare", "density", density)
    if convention == "peft":
        return Rule(Random(density, seed), "density", elect=elect, divide="none" if elect == "none" else "count")
    return Rule(Random(density, seed), "l1", elect=elect, votes="weighted")
