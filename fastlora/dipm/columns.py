"""Columns: of ``ΔW`` and of ``A`` one an input feature, of ``B`` one a rank."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.core.factors import Factor, concatenate, device_of
from fastlora.core.updates import NO_NOISE, Update, unscaled
from fastlora.dipm.module import ModulatedModule, dense, storage

# A column of ΔW that is shorter than this, relative to what it is the sum of, is rounding of the Gram matrix.
NOISE = 1e-7


def gram(module: ModulatedModule, on: str) -> Tensor:
    """Inner products of the members' vectors in every place: ``[k, k, P]``."""
    k = len(module.members)
    if on == "B":
        module.require_equal_ranks("granularity='column', on='B'")
        r = module.present[0].rank
        return module.scaled(module.left.diagonal(dim1=-2, dim2=-1)[..., :r])
    if on == "A":
        module.require_equal_ranks("granularity='column', on='A'")
    rows = [dense(u.A).to(module.device) for u in module.present]  # [r_k, m], where the factors are
    left = module.left.to(module.device)
    result = rows[0].new_zeros(k, k, rows[0].shape[1])
    for i in range(k):
        for j in range(i, k):
            inner = rows[j] if on == "A" else left[i, j, : len(rows[i]), : len(rows[j])] @ rows[j]
            result[i, j] = result[j, i] = (rows[i] * inner).sum(0)
    if on == "A":
        return result.cpu()
    # μ_c² = s² a_cᵀ G^B a_c, or nothing but its rounding
    for i, update in enumerate(module.present):
        own_left, own_right = (x[i, i, : update.rank, : update.rank] for x in (left, module.right))
        origin = unscaled(update.noise.origin, update)
        bound = torch.maximum(_terms(own_left, rows[i]), _share(origin, own_right.to(left.device), rows[i]))
        result[i, :, result[i, i] <= (NOISE * bound).square()] = 0.0
    result = module.scaled(result.cpu())
    return torch.where(_both(result), result, 0.0)


def _terms(left: Tensor, rows: Tensor) -> Tensor:
    """``Σ_j ‖b_j‖ |a_jc|`` of every column, which its terms cannot exceed however they cancel: ``[m]``."""
    return left.diagonal().clamp(min=0).sqrt() @ rows.abs()


def _share(origin: float, right: Tensor, rows: Tensor) -> Tensor:
    """What every column has of the largest singular value that a lazy update was computed from: ``[m]``.

    A column is much shorter than a singular value: of ``σ_max`` it has about ``‖a_c‖/‖A‖₂``, with rows of ``A`` that
    are brought to one length, since their lengths belong to ``B`` just as well.
    """
    if not 0 < origin < math.inf or not len(rows):
        return rows.new_full(rows.shape[1:], origin)
    lengths = right.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, 0.0)
    largest = torch.linalg.eigvalsh(inverse[:, None] * right * inverse)[-1].clamp(min=1.0).sqrt()
    share: Tensor = (inverse[:, None] * rows).square().sum(0).sqrt() / largest
    return origin * share


def _both(products: Tensor) -> Tensor:
    """Where both vectors of an inner product are there."""
    there = products.diagonal(dim1=0, dim2=1).mT > 0  # [k, P]
    return there[:, None] & there


def update(module: ModulatedModule, weights: Tensor, on: str) -> Update:
    """The update with the columns ``Σ_k weights_k x_k``, ``weights [K, P]``."""
    if on == "B":
        return module.factor_sum(list(weights), "B")
    pairs = [(u, w) for u, w in zip(module.updates, weights, strict=True) if u is not None and bool(w.any())]
    used = [(u, w.to(device_of([[u.A]]))) for u, w in pairs]
    dtype = storage([u for u, _ in used])
    if on == "A":
        total = sum(dense(u.A) * w for u, w in used)
        assert isinstance(total, Tensor)
        return replace(module.own, A=Factor.of("A", total.to(dtype)), noise=NO_NOISE)
    # Σ_k s_k B_k (A_k diag(w_k)): ranks add up
    left = [u.B.scaled(u.scaling) for u, _ in used]
    right = [Factor.of("A", (dense(u.A) * w).to(dtype)) for u, w in used]
    return Update(concatenate(left), concatenate(right), 1.0, used[0][0].layout)
