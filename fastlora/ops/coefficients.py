"""``coefficients``: what a decomposition puts on the stored factors, from Gram blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """Of ``g`` modules with ``k`` adapters of rank ``r``, a basis of width ``w`` on the first ``movers`` of them."""

    H: Tensor
    """``[g, k, w, r]``: ``H_i = ZᵀX_i``."""
    norms: Tensor
    """``[g, k]``: ``‖ΔW_i‖``."""
    shared: Tensor
    """``[g, k]``: ``‖ΔW_i^shared‖``, MATH (9)."""
    removal: Tensor
    """``[g, k, movers, r, r]``: ``-strength_i basis_j H_i``, what the unique part of ``i`` adds on ``X_j``."""
    mixing: Tensor
    """``[g, k, w, r]``: ``ω_i s_i H_i``, MATH (10); zero where nothing is shared."""
