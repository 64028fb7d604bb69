"""What a decomposition makes of its basis: coefficients of the shared and unique parts, MATH (7)–(10)."""

from __future__ import annotations

import torch
from torch import Tensor


def coefficients(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, movers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(H, norms, shared, removal, mixing)`` as :class:`fastlora.ops.coefficients.PartCoefficients` has them.

    Arguments as of :func:`shares`; ``strength [g, k]``: of the removals."""
    H, norms, shared = shares(projected, other, basis, scaling, movers)
    total = shared.sum(1, keepdim=True)
    omega = torch.where(total > 0, shared / total, 0.0)
    removal = -strength[:, :, None, None, None] * (basis[:, None, :movers] @ H[:, :, None])
    mixing = (omega * scaling)[:, :, None, None] * H
    return H, norms, shared, removal, mixing


def shares(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, movers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(H, norms, shared)``: ``H_i = ZᵀX_i [g, k, w, r]``, and ``‖ΔW_i‖`` and ``‖ΔW_i^shared‖``, MATH (9), ``[g, k]``.

    ``projected [g, k, k, r, r]`` (``i <= j``), ``other [g, k, r, r]``: Gram blocks. ``basis [g, k, r, w]``, of which
    the first ``movers`` count. ``scaling [g, k]``: the ``s_i``."""
    H = directions(projected, basis, movers)
    return H, whole_lengths(projected, other, scaling), lengths(H, other, scaling)


def directions(projected: Tensor, basis: Tensor, movers: int) -> Tensor:
    """``H_i = ZᵀX_i [g, k, w, r]``, with arguments as of :func:`shares`."""
    k = projected.shape[1]
    H = basis[:, :1].mT @ projected.select(1, 0)
    for j in range(1, movers):
        row = [projected[:, i, j].mT if i < j else projected[:, j, i] for i in range(k)]
        H += basis[:, j, None].mT @ torch.stack(row, 1)
    return H


def whole_lengths(projected: Tensor, other: Tensor, scaling: Tensor) -> Tensor:
    """``‖ΔW_i‖ [g, k]``, from the blocks on the diagonal."""
    diagonal = projected.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    return (diagonal * other).sum((-1, -2)).clamp(min=0).sqrt() * scaling.abs()


def lengths(H: Tensor, other: Tensor, scaling: Tensor) -> Tensor:
    """``‖s_i H_i A_i‖ [g, k]``: of a part with an orthonormal other side."""
    return ((H.mT @ H) * other).sum((-1, -2)).clamp(min=0).sqrt() * scaling.abs()
