"""Best low-rank approximation of a sum or of one adapter (resize), exact in factor space, MATH section 6."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.merging.registry import method


def default_rank(pool: Pool) -> int:
    """The largest rank of the pool."""
    return max((u.rank for a in pool.adapters for u in a.updates.values()), default=1)


@method(
    "svd",
    summary="best rank-r approximation of Σ wᵢΔWᵢ",
    parameters={"rank": "rank of the result", "energy": "share of Σσ² to keep, instead of a rank"},
    source="truncated SVD (Eckart–Young) in factor space; MATH section 6",
)
def svd(pool: Pool, weights: Mapping[str, float], *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of ``Σ w_i ΔW_i``; without ``rank`` and ``energy``, at the largest rank of the pool."""
    total = Adapter.weighted_sum([(weights[name], pool[name]) for name in pool.names], name="svd")
    if rank is None and energy is None:
        rank = default_rank(pool)
    return total.compress(rank, energy=energy)
