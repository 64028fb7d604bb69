"""The subspaces that several small matrices have most of together, by conjugate gradients: see ``ops/tucker.py``."""

from __future__ import annotations

import torch
from torch import Tensor

# What a step may gain, relative to all, below which it is rounding.
ROUNDING = 1e-16
# The longest step, as a tangent: beyond it the quadratic model says nothing.
LONGEST = 4.0
# Where a step makes it worse, a quarter of it is tried, and so on.
SHORTER, TRIES = 0.25, 12


def tucker(
    left: Tensor, right: Tensor, U: Tensor, V: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``V`` that climb ``Σ_i ‖Uᵀ L_i R_iᵀ V‖²``, and the steps that each module took."""
    L, R = left.mT, right.mT  # [g, k, n, r]
    moving = torch.ones(len(U), dtype=torch.bool, device=U.device)
    steps = torch.zeros(len(U), dtype=torch.int64, device=U.device)
    D, E, before = torch.zeros_like(U), torch.zeros_like(V), (torch.zeros_like(U), torch.zeros_like(V))
    steepness = torch.full((len(U),), torch.inf, dtype=torch.float64, device=U.device)
    for _ in range(iterations):
        if not bool(moving.any()):
            break
        P, Q = left @ U[:, None], right @ V[:, None]  # [g, k, r, c]
        S = P.mT @ Q
        along = (S @ S.mT).sum(1), (S.mT @ S).sum(1)
        slopes = (L @ (Q @ S.mT)).sum(1) - U @ along[0], (R @ (P @ S)).sum(1) - V @ along[1]
        last = steepness
        steepness = _dot(slopes[0], slopes[0]) + _dot(slopes[1], slopes[1])
        overlap = _dot(slopes[0], before[0]) + _dot(slopes[1], before[1])
        beta = ((steepness - overlap) / last.clamp(min=1e-300)).clamp(min=0)
        onward = _dot(slopes[0], D) + _dot(slopes[1], E)
        beta = torch.where(steepness + beta * onward > 0, beta, 0.0)
        slope, before = steepness + beta * onward, slopes
        D = slopes[0] + beta[:, None, None] * (D - U @ (U.mT @ D))
        E = slopes[1] + beta[:, None, None] * (E - V @ (V.mT @ E))

        first, second = left @ D[:, None], right @ E[:, None]
        changed, twice = first.mT @ Q + P.mT @ second, first.mT @ second
        squares = D.mT @ D, E.mT @ E
        bend = _dot(changed, changed) + 2 * _dot(S, twice) - _dot(squares[0], along[0]) - _dot(squares[1], along[1])
        length = torch.maximum(*(x.diagonal(dim1=1, dim2=2).sum(1) for x in squares)).sqrt().clamp(min=1e-300)
        curved = bend < 0
        t = torch.where(curved, torch.minimum(slope / torch.where(curved, -bend, 1.0), LONGEST / length), 1 / length)
        moving = moving & (slope * t > ROUNDING)
        t = torch.where(moving, t, 0.0)
        kept = _dot(S, S)
        found, U, V, moving = _moved(left, right, (U, V), (D, E), t, kept, moving)
        steps += moving
        change = (1 - kept).clamp(min=0).sqrt() - (1 - found).clamp(min=0).sqrt()
        moving = moving & (change.abs() >= tolerance)
    return U, V, steps


def _moved(
    left: Tensor,
    right: Tensor,
    at: tuple[Tensor, Tensor],
    way: tuple[Tensor, Tensor],
    t: Tensor,
    kept: Tensor,
    moving: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``f``, ``U`` and ``V`` after a step of those that are ``moving``, and who has moved."""
    waiting = moving
    found, (U, V) = kept, at
    for _ in range(TRIES):
        next_U, next_V = (_orthonormal(x + t[:, None, None] * d) for x, d in zip(at, way, strict=True))
        value = ((left @ next_U[:, None]).mT @ (right @ next_V[:, None])).square().sum((1, 2, 3))
        better = waiting & (value >= kept)
        found = torch.where(better, value, found)
        U, V = (torch.where(better[:, None, None], x, y) for x, y in ((next_U, U), (next_V, V)))
        waiting = waiting & ~better
        if not bool(waiting.any()):
            break
        t = SHORTER * t
    return found, U, V, moving & ~waiting


def _orthonormal(x: Tensor) -> Tensor:
    root = torch.linalg.cholesky(x.mT @ x)
    transposed: Tensor = torch.linalg.solve_triangular(root, x.mT, upper=False)
    return transposed.mT


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
