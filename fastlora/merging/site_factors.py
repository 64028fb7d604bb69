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


def inverse_of(gram: Tensor, weights: Tensor, ridge: float, width: int) -> tuple[Tensor | None, float]:
    """``(YYᵀ + εI)⁻¹ [N, N]`` and ``ε``; ``None`` where all rows are zero.

    What it is multiplied with is ``AYᵀ`` on one side and ``Y`` on the other, so that errors are those of solves: the
    rounding times the condition of ``YYᵀ + εI``, at most ``m/ridge``. Cost: ``N³`` operations in float64.
    """
    factor, epsilon = factored(weighted(gram, weights), ridge, width)
    return None if factor is None else torch.cholesky_inverse(factor).contiguous(), epsilon


def over_rows(numbers: Sequence[float], rows: Sequence[Tensor]) -> Tensor:
    """A number of each as one of every row: ``[N]``."""
    counts = torch.tensor([len(x) for x in rows])
    return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(counts)


def mean_scales(rows: Sequence[Tensor]) -> list[float]:
    """``1/√N_i`` of each."""
    return [1.0 / math.sqrt(max(len(x), 1)) for x in rows]
