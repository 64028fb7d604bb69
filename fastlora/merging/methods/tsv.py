"""TSV-M: task singular vectors, made orthogonal to each other, arXiv 2412.00081, restricted to the ranks that are."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import polar, product_svd, side_by_side, significant
from fastlora.merging.forms.frames import Cut

Spectrum = Literal["own", "flat", "rms"]


@cores.method(
    summary="U⊥ Σ V⊥ᵀ of all wᵢΔWᵢ = UᵢΣᵢVᵢᵀ side by side, U⊥ and V⊥ the nearest orthonormal bases",
    source="TSV-M, arXiv 2412.00081, with all directions that an update has; `flat`: DC-Merge, arXiv 2603.06242",
    whole=True,
)
def tsv(stack: Tensor, sides: tuple[Tensor, Tensor], noise: Cut, *, spectrum: Spectrum = "own") -> Tensor:
    """``U⊥ diag(σ) V⊥ᵀ`` with ``U⊥ = U (UᵀU)^-½``, ``U = [U_1 | U_2 | …]`` and ``σ = (σ_1, σ_2, …)``, ``V⊥`` alike.

    ``U_i diag(σ_i) V_iᵀ`` is the singular form of ``w_i ΔW_i``, without directions below the noise of its dtype. On
    full matrices the paper keeps ``min(n, m)/k`` directions of each, most of which a LoRA update does not have.
    Duplicates make ``UᵀU`` singular, and the root is then the pseudo-inverse one: copies of one update give that
    update. One adapter stays as it is (with its own spectrum). Cost: ``O(R³)`` a module.

    Trap: what is cut to a rank afterwards loses the weaker tasks first.

    Args:
        spectrum: of every update: its own σ, all at their mean (flat), or all at their root mean square (rms)
    """
    U, sigma, V = product_svd(*sides)
    kept = significant(noise, sigma).double()  # [g, k, r]
    count = kept.sum(2, keepdim=True).clamp(min=1)
    sizes = {
        "own": sigma * kept,
        "flat": kept * (sigma * kept).sum(2, keepdim=True) / count,
        "rms": kept * ((sigma * kept).square().sum(2, keepdim=True) / count).sqrt(),
    }[spectrum]
    left, right = (polar(side_by_side(x * kept[:, :, None]), noise.rtol) for x in (U, V))
    return (left * sizes.flatten(1)[:, None]) @ right.mT
