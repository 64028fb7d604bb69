"""Task arithmetic, arXiv 2212.04089: the exact weighted sum, scaled."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.merging.forms import factors
from fastlora.merging.registry import method


@method("factors", summary="λ Σ wᵢΔWᵢ, exact", source="task arithmetic, arXiv 2212.04089; `cat` is the sum with λ = 1")
def sum(pool: Pool, weights: Mapping[str, float], *, strength: float = 1.0) -> Adapter:
    """``ΔW = λ Σ_i w_i ΔW_i`` with ``B = [λ w_1 s_1 B_1 | …] [n, R]`` and ``A = [A_1; …] [R, m]``, ``R = Σ r_i``.

    Biases take the same weights. The result of one adapter of weight 1 is that adapter, of ``k`` copies ``k`` times it.
    Nothing is computed before the result is used. No λ is right everywhere: on trained pools the best ``k·λ`` lay
    between 0.8 and 3.7, and 1 was the collapse of some (docs/methods.md).

    Args:
        strength: λ, what the sum is multiplied by
    """
    return factors.total("sum", pool, {n: strength * w for n, w in weights.items()}, {"strength": strength})
