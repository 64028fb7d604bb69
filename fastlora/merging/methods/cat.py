"""Concatenation: the exact weighted sum at the sum of the ranks, MATH section 6."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.engine.checks import require_finite
from fastlora.merging.registry import method


@method("cat", summary="exact Σ wᵢΔWᵢ, rank Σrᵢ", parameters={}, source="LoRA by concatenation; MATH section 6")
def cat(pool: Pool, weights: Mapping[str, float]) -> Adapter:
    """``ΔW = Σ w_i ΔW_i`` exactly."""
    require_finite(pool.adapters)  # no Gram pass here would find NaN
    return Adapter.weighted_sum([(weights[name], pool[name]) for name in pool.names], name="cat")
