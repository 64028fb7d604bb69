"""The matrix of products of rows of inputs that a filter divides by, factored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.errors import InputError

RIDGE = 1e-4
"""``ε`` as a share of the mean of the diagonal of ``ΣC_i``, unless another one is asked for."""


def weighted(gram: Tensor, weights: Tensor) -> Tensor:
    """``YYᵀ`` from ``XXᵀ [N, N]``, where every row of ``Y`` is one of ``X`` times its weight; a new matrix."""
    return (gram * weights).mul_(weights[:, None])


def factored(matrix: Tensor, ridge: float, width: int) -> tuple[Tensor | None, float]:
    """The Cholesky factor of a ``matrix``, which is changed, with ``ε = ridge·tr/width`` on its diagonal, and ``ε``;
    ``None`` where all rows are zero. ``width``: ``m``, of the rows.

    Raises :class:`InputError` for a ridge that rounding hides. Cost: ``N³/3`` operations in float64.
    """
    epsilon = ridge * float(matrix.diagonal().sum()) / width
    if not epsilon > 0.0:
        return None, epsilon
    matrix.diagonal().add_(epsilon)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise InputError(
            f"ridge={ridge:g} is lost in the rounding of the inputs' products; give a larger one, such as 1e-8"
        )
    return factor, epsilon


def inverse_root(gram: Tensor, weights: Tensor, ridge: float, width: int) -> tuple[Tensor | None, float]:
    """``L⁻¹ [N, N]`` of ``YYᵀ + εI = LLᵀ``, and ``ε``; ``None`` where all rows are zero.

    Products with ``L⁻¹`` cost what triangular solves do, and take a quarter of the time for few right sides. Their
    error is that of solves, the rounding times the condition of ``YYᵀ + εI``: what is divided is ``AYᵀ``, and
    ``‖L⁻¹Y‖ ≤ 1``. Cost: ``4N³/3`` operations in float64.
    """
    factor, epsilon = factored(weighted(gram, weights), ridge, width)
    if factor is None:
        return None, epsilon
    eye = torch.eye(len(factor), dtype=torch.float64)
    return torch.linalg.solve_triangular(factor, eye, upper=False).contiguous(), epsilon


def over_rows(numbers: Sequence[float], rows: Sequence[Tensor]) -> Tensor:
    """A number of each as one of every row: ``[N]``."""
    counts = torch.tensor([len(x) for x in rows])
    return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(counts)


def mean_scales(rows: Sequence[Tensor]) -> list[float]:
    """``1/√N_i`` of each."""
    return [1.0 / math.sqrt(max(len(x), 1)) for x in rows]
