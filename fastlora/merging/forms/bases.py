"""Small programs on cores that several methods are made of, all float64 and batched over modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.merging.forms.frames import Cut


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``left rightᵀ = U diag(σ) Vᵀ`` of thin ``left [..., R, r]``, ``right [..., R, r]``: ``U``, ``σ [..., r]``, ``V``.

    Two QR decompositions and the singular value decomposition of an ``r×r`` matrix: ``O(R r²)``, nothing is squared.
    ``r ≤ R``. Directions of zero are orthonormal too.
    """
    first, upper = torch.linalg.qr(left)
    second, lower = torch.linalg.qr(right)
    U, sigma, Vt = ops.svd((upper @ lower.mT).contiguous())
    return first @ U, sigma, second @ Vt.mT


def significant(noise: Cut, sigma: Tensor) -> Tensor:
    """Which singular values ``[g, k, r]`` of each of ``k`` updates a cut leaves: bool."""
    counts = torch.stack([noise(row) for row in sigma.unbind(1)], 1)  # [g, k]
    return torch.arange(sigma.shape[2]) < counts[:, :, None]


def polar(columns: Tensor, rtol: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, ``X (XᵀX)^-½`` for ``X [g, R, c]``: the answer of Procrustes.

    Where ``X`` has no full rank, as of duplicates or columns of zeros, the root is the pseudo-inverse one: the result
    is a partial isometry on the row space of ``X``. Singular values below ``rtol [g]`` of the largest are rounding.
    """
    wide = columns.shape[2] > columns.shape[1]
    gram = columns @ columns.mT if wide else columns.mT @ columns
    values, vectors = ops.eigh(gram.contiguous())
    kept = values > rtol.square()[:, None] * values[:, -1:].clamp(min=0)
    root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    inverse_root = (vectors * root[:, None]) @ vectors.mT
    return inverse_root @ columns if wide else columns @ inverse_root


def leading(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues of ``[g, R, R]``, descending: ``[g, R, count]``."""
    return ops.eigh(symmetric.contiguous())[1].flip(-1)[..., :count]


def side_by_side(stack: Tensor) -> Tensor:
    """``[M_1 | M_2 | …]``: ``[g, k, R, r]`` as ``[g, R, k·r]``."""
    return stack.transpose(1, 2).flatten(2)


def squares_of(stack: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_i M_i M_iᵀ`` and ``Σ_i M_iᵀ M_i`` of ``[g, k, R, R]``, each as one product."""
    beside, below = side_by_side(stack), stack.flatten(1, 2)
    return beside @ beside.mT, below.mT @ below


def squared_norms(stack: Tensor) -> Tensor:
    """``‖M_i‖²`` of ``[g, k, R, R]``: ``[g, k]``."""
    return stack.square().sum((2, 3))
