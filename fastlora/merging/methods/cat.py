"""Concatenation: the exact weighted sum at the sum of the ranks, MATH section 6."""

from __future__ import annotations

from collections.abc import Sequence

from fastlora.core.sums import sum_updates
from fastlora.core.updates import Update
from fastlora.merging.forms import factors


@factors.method(summary="exact Σ wᵢΔWᵢ", source="LoRA by concatenation; MATH section 6")
def cat(terms: Sequence[tuple[float, Update]]) -> Update:
    """``B = [w_1 s_1 B_1 | w_2 s_2 B_2 | …]`` and ``A = [A_1; A_2; …]``: ``ΔW = Σ w_i ΔW_i`` exactly."""
    return sum_updates(terms)
