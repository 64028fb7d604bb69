"""Best low-rank approximation of a sum, exact in factor space, MATH section 6."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter, sum_of_aligned
from fastlora.adapters.pool import Pool
from fastlora.merging.forms.result import largest_rank
from fastlora.merging.registry import method


@method(
    "cores",
    summary="best rank-r approximation of Σ wᵢΔWᵢ",
    source="truncated SVD (Eckart–Young) in factor space; MATH section 6",
)
def svd(pool: Pool, weights: Mapping[str, float], *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of ``Σ w_i ΔW_i`` (Eckart–Young).

    Its core is the sum of the cores. The sum is an adapter itself, so no core of one adapter has to be formed:
    :meth:`Adapter.compress` does the rest, on a device too.

    Args:
        rank: rank of the result; by default the largest rank of the pool
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank
    """
    total = sum_of_aligned([(weights[a.name], a) for a in pool.adapters], "svd")
    if rank is None and energy is None:
        rank = largest_rank(pool)
    return total.compress(rank, energy=energy)
