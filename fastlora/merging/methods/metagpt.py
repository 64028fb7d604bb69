"""MetaGPT, arXiv 2406.11385: weights from norms alone."""

from __future__ import annotations

from torch import Tensor

from fastlora.merging.forms import weights


@weights.method(
    summary="Σ cᵢwᵢΔWᵢ, cᵢ = ‖wᵢΔWᵢ‖² / Σ‖wⱼΔWⱼ‖² over all modules",
    source="MetaGPT, arXiv 2406.11385",
    over="pool",
)
def metagpt(inner: Tensor) -> Tensor:
    """``c_i = ‖X_i‖² / Σ_j ‖X_j‖²`` for ``X_i = w_i ΔW_i``; norms are those of all modules together.

    ``inner [1, k, k]``: ``⟨X_i, X_j⟩`` → ``c [1, k]``. It minimises the loss that the paper assumes for orthogonal
    updates. The largest adapter gets nearly everything: at a ratio of norms of 3 its weight is 0.9. One adapter stays
    as it is; the result of copies of one update is that update.
    """
    squares = inner[0].diagonal().clamp(min=0)
    total = squares.sum()
    return (squares / (total if float(total) > 0 else 1.0))[None]
