"""Compress, then merge: a rule on the elements of small cores in the best common subspaces, arXiv 2606.03723."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.elementwise import Combine, Elementwise, Rule, idle
from fastlora.merging.forms.frames import Cut
from fastlora.merging.forms.tucker import common_subspaces, squared_norms_of_sides, squares_of_sides
from fastlora.merging.registry import driven


@driven(
    "cores",
    cores.merge_to_rank,
    "U rule(UᵀwᵢΔWᵢV) Vᵀ in the r-dimensional U, V that keep most of all updates (Tucker-2)",
    "Compress then Merge, arXiv 2606.03723; the maximum as by tensorly's `partial_tucker`",
    cost="Gram, iterated",
    rank="rank, largest rᵢ by default",
    idle=idle,
)
def ctm(
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
    rule sees ``X_i`` itself. From the leading eigenvectors of ``Σ X̂_iᵀX̂_i`` (HOSVD), ``U`` and ``V`` are in turn those
    of ``Σ X̂_iVVᵀX̂_iᵀ`` and ``Σ X̂_iᵀUUᵀX̂_i``, once. The paper goes on in that way (HOOI), and here conjugate gradients
    do, until a step changes the error by less than ``tolerance``. Where there are several maxima, it may be another.
    The result has rank ``r`` at the most, and is not cut after the rule, which would cost more. With the rank of the
    pool nothing is lost, and a linear rule gives the sum. Cost: five eigendecompositions of ``R×R``, and some 20 steps
    of ``16 R² r`` operations.

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
    norms = squared_norms_of_sides(*sides).sqrt()  # [g, k]
    count = (norms > 0).sum(1, keepdim=True).clamp(min=1)
    wanted = balance * norms + (1 - balance) * norms.sum(1, keepdim=True) / count
    factor = torch.where(norms > 0, wanted / norms, 0.0)[:, :, None, None]
    blended = sides[0] * factor, sides[1]
    grams = squares_of_sides(*blended)
    R = grams[0].shape[1]
    left, right = common_subspaces(blended, grams, min(cut.rank or R, R), iterations, tolerance)
    counts = nulls.above(_spectrum(left, grams[0])), nulls.above(_spectrum(right, grams[1]))
    return elementwise.in_frames(sides, left, right, counts, weights, keys)


def _spectrum(base: Tensor, gram: Tensor) -> Tensor:
    """What the updates have along the directions of a basis, descending: ``[g, c]``."""
    energies = (base * (gram @ base)).sum(1)
    return energies.clamp(min=0).sqrt().sort(dim=1, descending=True).values
