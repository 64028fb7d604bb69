"""Compress, then merge: a rule on the elements of small cores in the best common subspaces, arXiv 2606.03723."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import leading, side_by_side, squared_norms, squares_of
from fastlora.merging.forms.elementwise import Combine, Elementwise, Rule, idle
from fastlora.merging.forms.frames import Cut
from fastlora.merging.registry import driven


@driven(
    "cores",
    cores.merge_to_rank,
    "U rule(UᵀwᵢΔWᵢV) Vᵀ in the r-dimensional U, V that keep most of all updates (Tucker-2)",
    "Compress then Merge, arXiv 2606.03723; HOOI as in tensorly's `partial_tucker`",
    cost="Gram, iterated",
    rank="rank, largest rᵢ by default",
    idle=idle,
)
def ctm(
    stack: Tensor,
    sides: tuple[Tensor, Tensor],
    weights: Tensor,
    keys: tuple[Sequence[str], Sequence[str]],
    cut: Cut,
    nulls: Cut,
    *,
    rule: Rule = "ties",
    density: float = 0.25,
    combine: Combine = "mean",
    seed: int = 0,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    select_topk: float = 1.0,
    balance: float = 0.25,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    """``U · rule(Uᵀ X_1 V, …) · Vᵀ``, ``X_i = w_i ΔW_i``, with ``U [n, r]``, ``V [m, r]`` that maximise
    ``Σ_i ‖Uᵀ X̂_i V‖²``.

    ``X̂_i`` is ``X_i`` at the norm ``β‖X_i‖ + (1 − β)·mean_j‖X_j‖``, so that no adapter decides the subspaces alone; the
    rule sees ``X_i`` itself. From the leading eigenvectors of ``Σ X̂_iX̂_iᵀ`` and ``Σ X̂_iᵀX̂_i`` (HOSVD), ``U`` and ``V``
    are in turn those of ``Σ X̂_iVVᵀX̂_iᵀ`` and ``Σ X̂_iᵀUUᵀX̂_i``, until the error changes by less than ``tolerance``.
    The result has rank ``r`` at the most, and is not cut after the rule, which would cost more. With the rank of the
    pool nothing is lost, and a linear rule gives the sum. Cost: two eigendecompositions of ``R×R`` an iteration.

    Args:
        rule: what is done with the elements, as the methods of these names do; della_linear elects no signs
        density: share of the r×r elements that every adapter keeps, in (0, 1]
        combine: what rules with elected signs take of the elements that agree, their mean or their sum
        seed: of the random masks of dare and della, which also depend on the names of adapters and modules
        gamma: of breadcrumbs, the share of the largest elements that are dropped, in [0, 1)
        epsilon: of della, half the span of the probabilities; density ± epsilon must lie in [0, 1]
        select_topk: of sce, the share of the places that vary which are kept, in (0, 1]
        balance: β, from 0 (all adapters count alike in the choice of the subspaces) to 1 (by their size)
        iterations: steps at the most
        tolerance: change of the relative error below which the subspaces stay
    """
    elementwise = Elementwise("ctm", rule, density, combine, seed, gamma, epsilon, select_topk)
    if not 0.0 <= balance <= 1.0 or iterations < 0 or not tolerance > 0:
        raise InputError(
            f"ctm: balance={balance:g} must be between 0 and 1, iterations={iterations} at least 0, "
            f"tolerance={tolerance:g} above 0"
        )
    norms = squared_norms(stack).sqrt()  # [g, k]
    count = (norms > 0).sum(1, keepdim=True).clamp(min=1)
    wanted = balance * norms + (1 - balance) * norms.sum(1, keepdim=True) / count
    factor = torch.where(norms > 0, wanted / norms, 0.0)[:, :, None, None]
    R = stack.shape[2]
    grams = squares_of(stack * factor)
    rank = min(cut.rank or R, R)
    left, right = _subspaces(grams, (sides[0] * factor, sides[1]), rank, iterations, tolerance)
    counts = nulls.above(_spectrum(left, grams[0])), nulls.above(_spectrum(right, grams[1]))
    return elementwise.in_frames(sides, left, right, counts, weights, keys)


def _spectrum(base: Tensor, gram: Tensor) -> Tensor:
    """What the updates have along the directions of a basis, descending: ``[g, c]``."""
    energies = (base * (gram @ base)).sum(1)
    return energies.clamp(min=0).sqrt().sort(dim=1, descending=True).values


def _subspaces(
    grams: tuple[Tensor, Tensor], sides: tuple[Tensor, Tensor], rank: int, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """``U``, ``V`` ``[g, R, rank]`` by HOOI on ``M_i = L_i R_iᵀ``; modules that have converged are left alone.

    ``grams``: ``Σ M_iM_iᵀ`` and ``Σ M_iᵀM_i``.
    """
    left, right = (leading(gram, rank).clone() for gram in grams)
    total = grams[0].diagonal(dim1=1, dim2=2).sum(1)  # Σ‖M_i‖²  [g]
    before, moving = torch.full_like(total, torch.inf), torch.arange(len(total))
    for _ in range(iterations if rank < grams[0].shape[1] else 0):
        L, R = (side[moving] for side in sides)
        across = side_by_side(L @ (R.mT @ right[moving][:, None]))  # [M_1 V | M_2 V | …]
        left[moving] = leading(across @ across.mT, rank)
        across = side_by_side(R @ (L.mT @ left[moving][:, None]))  # [M_1ᵀU | M_2ᵀU | …]
        right[moving] = leading(across @ across.mT, rank)
        kept = (right[moving].mT @ across).square().sum((1, 2))
        error = (1 - kept / total[moving].clamp(min=1e-300)).clamp(min=0).sqrt()
        goes_on = (before[moving] - error).abs() >= tolerance
        before[moving] = error
        moving = moving[goes_on & (total[moving] > 0)]
        if not len(moving):
            break
    return left, right
