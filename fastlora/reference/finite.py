"""Whether a matrix holds neither NaN nor Inf."""

from __future__ import annotations

from torch import Tensor


def finite(x: Tensor) -> bool:
    """``∀ i, j: |x_ij| < ∞``."""
    return bool(x.isfinite().all())
