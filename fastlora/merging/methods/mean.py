"""The weighted mean of the updates."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.merging.forms import factors
from fastlora.merging.forms.shares import normalised
from fastlora.merging.registry import method


@method("factors", summary="Σ wᵢΔWᵢ / Σ wᵢ, exact", source="model soups, arXiv 2203.05482; mergekit's `linear`")
def mean(pool: Pool, weights: Mapping[str, float]) -> Adapter:
    """``ΔW = Σ_i w_i ΔW_i / Σ_i w_i``, of rank ``Σ r_i``; biases take the same weights.

    The sums are over the whole pool: a module that an adapter lacks counts as zero there. The mean of copies of one
    adapter is that adapter. It is the best merge in least squares when all adapters see the same inputs, and too short
    by a factor of up to ``k`` when they see disjoint ones.
    """
    return factors.total("mean", pool, normalised("mean", weights), {})
