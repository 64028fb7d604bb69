"""``finite``: whether a matrix holds neither NaN nor Inf."""

from __future__ import annotations

from torch import Tensor

from fastlora.ops import dispatch


def is_finite(x: Tensor) -> bool:
    """``∀ i, j: |x_ij| < ∞`` for ``x [rows, columns]``, float16, bfloat16, float32 or float64, rows contiguous.

    It is no torch operator, since its result decides what the program does next. Costs one read; a pass for Gram
    blocks finds the same for free. Raises nothing but what :func:`fastlora.ops.dispatch.resolve` raises.
    """
    return bool(dispatch.run("finite", x))
