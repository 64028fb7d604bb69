"""Magnitude pruning: only the largest elements of every update are summed."""

from __future__ import annotations

from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Largest, Rule, check_share


@tiles.rule(
    summary="elementwise: Σ wᵢ of the largest magnitudes of each ΔWᵢ",
    source="PEFT's magnitude_prune_svd",
)
def magnitude(*, density: float) -> Rule:
    """``Σ_i w_i v_i``, where ``v_i`` keeps the ``⌊density·n·m⌋`` largest magnitudes of ``ΔW_i`` in a module, of equals
    the first in the order of rows; the others are 0. Nothing is rescaled, so the sum gets shorter.

    Args:
        density: share of the elements of a module that every adapter keeps, in (0, 1]
    """
    check_share("magnitude", "density", density)
    return Rule(Largest(density))
