"""Products added to a matrix, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Products = tuple[int, int, Sequence[tuple[Tensor, Tensor]], Sequence[float]]


def add_products(W: Tensor, segments: Sequence[Products]) -> Tensor:
    """``W + Σ_i s_i L_i R_i``, float64, for segments ``(left, width, (L_i, R_i), s_i)`` of columns."""
    out = W.double().clone()
    for left, width, pairs, scales in segments:
        for (L, R), scale in zip(pairs, scales, strict=True):
            out[:, left : left + width] += scale * (L.double() @ R.double())
    return out
