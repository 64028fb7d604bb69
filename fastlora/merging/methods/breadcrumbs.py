"""Model breadcrumbs, arXiv 2312.06795: neither the smallest nor the largest elements."""

from __future__ import annotations

from typing import Literal

from fastlora.errors import InputError
from fastlora.merging.forms import tiles
from fastlora.merging.forms.tile_rules import Between, Rule, check_share


@tiles.rule(
    summary="elementwise: Σ wᵢ of each ΔWᵢ without its largest and its smallest magnitudes",
    source="Model Breadcrumbs, arXiv 2312.06795; mergekit's breadcrumbs and breadcrumbs_ties",
)
def breadcrumbs(*, density: float, gamma: float = 0.01, elect: Literal["none", "total", "frequency"] = "none") -> Rule:
    """``Σ_i w_i v_i``, where ``v_i`` lacks the ``⌊γ·n·m⌋`` largest magnitudes of ``ΔW_i`` in a module and keeps the
    ``⌊density·n·m⌋`` that follow. Where density + γ > 1, fewer of the largest are dropped, as in mergekit.

    Args:
        density: share of the elements of a module that every adapter keeps, in (0, 1]
        gamma: share of the largest magnitudes that are dropped, in [0, 1)
        elect: whether signs are elected as in TIES, with weighted votes: none, total or frequency
    """
    check_share("breadcrumbs", "density", density)
    if not 0.0 <= gamma < 1.0:
        raise InputError(f"breadcrumbs: gamma={gamma:g} must be at least 0 and below 1")
    return Rule(Between(density, gamma), elect=elect, votes="weighted")
