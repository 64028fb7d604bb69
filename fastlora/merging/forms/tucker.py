"""The subspaces that several small matrices have most of together: Tucker-2.

Wanted are orthonormal ``U``, ``V`` that maximise ``Σ_i ‖Uᵀ M_i V‖²``. Alternating eigenvectors (HOOI) climb it too, but
two eigendecompositions a step are most of a merge, and where no directions stand out that takes a hundred steps. Here
one step of HOOI, which finds the hill, is followed by the conjugate gradients of :func:`fastlora.ops.tucker.tucker`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.merging.forms.bases import leading
from fastlora.ops.tucker import tucker

Pair = tuple[Tensor, Tensor]


def squared_norms_of_sides(L: Tensor, R: Tensor) -> Tensor:
    """``‖M_i‖² [g, k]`` of ``M_i = L_i R_iᵀ``."""
    return ((L.mT @ L) * (R.mT @ R)).sum((2, 3)).clamp(min=0)


def squares_of_sides(L: Tensor, R: Tensor) -> Pair:
    """``Σ M_i M_iᵀ [g, n, n]`` and ``Σ M_iᵀ M_i [g, m, m]`` of ``M_i = L_i R_iᵀ``, sides ``[g, k, ·, r]``.

    No ``M_i`` is formed. The rounding is that of Gram matrices of the sides.
    """
    return _square(L.mT, R.mT @ R), _square(R.mT, L.mT @ L)


def common_subspaces(sides: Pair, grams: Pair, rank: int, iterations: int, tolerance: float) -> Pair:
    """``U [g, n, rank]``, ``V [g, m, rank]``, orthonormal, at a maximum of ``Σ_i ‖Uᵀ M_i V‖²``.

    Args:
        sides: ``L [g, k, n, r]``, ``R [g, k, m, r]`` with ``M_i = L_i R_iᵀ``, float64.
        grams: :func:`squares_of_sides`.
        rank: at most ``n`` and ``m``; with all directions there is nothing to choose.
        iterations: steps at the most, the one of HOOI among them; without any, the leading eigenvectors (HOSVD).
        tolerance: a module is done when a step changes ``(1 − f/Σ‖M_i‖²)^½`` by less.

    Columns are eigenvectors of ``UᵀΣM_iVVᵀM_iᵀU`` and ``VᵀΣM_iᵀUUᵀM_iV``, descending, as where HOOI ends. Cost: three
    eigendecompositions a module, and the steps.
    """
    right = leading(grams[1], rank)
    if iterations < 1 or rank >= max(grams[0].shape[1], grams[1].shape[1]):
        return leading(grams[0], rank), right
    total = grams[0].diagonal(dim1=1, dim2=2).sum(1)
    scale = torch.where(total > 0, total.clamp(min=1e-300).rsqrt(), 0.0)  # to Σ‖M_i‖² = 1
    L, R = (sides[0] * scale[:, None, None, None]).mT.contiguous(), sides[1].mT.contiguous()  # [g, k, r, ·]
    left = leading(_seen_through(L, R, right), rank)
    right = leading(_seen_through(R, L, left), rank)
    left, right, _ = tucker(L, R, left, right, iterations=iterations - 1, tolerance=tolerance)
    inner = (L @ left[:, None]).mT @ (R @ right[:, None])  # [g, k, rank, rank]
    turns = (leading(x.sum(1), rank) for x in (inner @ inner.mT, inner.mT @ inner))
    left, right = (base @ turn for base, turn in zip((left, right), turns, strict=True))
    return left, right


def _seen_through(L: Tensor, R: Tensor, V: Tensor) -> Tensor:
    """``Σ M_i V Vᵀ M_iᵀ`` of ``M_i = L_i R_iᵀ``, given ``L_iᵀ`` and ``R_iᵀ``."""
    inside = R @ V[:, None]
    return _square(L, inside @ inside.mT)


def _square(rows: Tensor, inner: Tensor) -> Tensor:
    """``Σ L_i G_i L_iᵀ``, given ``L_iᵀ [g, k, r, n]`` and ``G [g, k, r, r]``, as one product."""
    return rows.flatten(1, 2).mT @ (inner @ rows).flatten(1, 2)
