"""Weights for ``Σ w_i ΔW_i`` from the Gram blocks alone: no data, no training, no dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.coefficients.pool_gram import PoolGram
from fastlora.engine.blocks import PairBlocks, read_pair_blocks
from fastlora.engine.inner_products import summed
from fastlora.errors import InputError

# Directions of a normal equation that are rounding: duplicates and opposites of other adapters.
RTOL = 1e-9


def weights(pool: Pool | PoolGram, method: str = "least_interference") -> dict[str, float]:
    """A weight for every adapter of the pool, for :func:`fastlora.merge`; docs/coefficients.md has the derivations.

    Args:
        pool: the adapters; a :class:`fastlora.PoolGram` spares reading the factors.
        method: ``"equal_energy"``: ``w_i ∝ 1/‖ΔW_i‖_F``, ``Σ w_i = 1``: every term ``w_i ΔW_i`` has the same norm.
            *Our definition.*

            ``"matched_norm"``: one weight for all, ``w = (1/k) Σ_i ‖ΔW_i‖ / ‖Σ_i ΔW_i‖``: the merged update has the
            mean norm of the adapters that are not zero, which averaging would shrink. *Our definition.*

            ``"least_interference"``: the minimiser over ``w`` of ``Σ_l Σ_i ‖(Σ_j w_j ΔW_j − ΔW_i) ΔW_iᵀ‖_F² /
            ‖ΔW_i‖_F²``, the objective of WUDI-Merging (arXiv 2503.08099; rows of ``ΔW_i`` stand for the inputs of task
            ``i``) restricted to weighted sums, where it has a closed form. Of several minimisers (multiples or sums of
            others) the one of least ``Σ w_i²``. 1 for every adapter when their row spaces are orthogonal, ``1/k`` for
            ``k`` equal ones.

    Returns:
        ``{name: weight}``. A zero adapter has the weight 0.

    Raises:
        InputError: an unknown method; all updates zero; ``matched_norm`` when the updates cancel.

    Cost: two passes over the factors (none for a PoolGram) and, for ``least_interference``, ``O(k³r³)`` a module.
    """
    if method not in METHODS:
        raise InputError(f"weights: method={method!r} does not exist: use one of {', '.join(METHODS)}")
    if isinstance(pool, PoolGram):
        with pool:
            values = METHODS[method](pool.pool)
        names = pool.pool.names
    else:
        values, names = METHODS[method](pool), pool.names
    return dict(zip(names, values.tolist(), strict=True))


def _inner(pool: Pool) -> Tensor:
    """``⟨ΔW_i, ΔW_j⟩`` summed over modules, MATH (13): ``[k, k]``; from the Gram cache in use where it has them."""
    total = summed(pool)
    if not bool(total.diagonal().any()):
        raise InputError("weights: every update of the pool is zero, so no weight has a meaning")
    return total


def equal_energy(pool: Pool) -> Tensor:
    """``w_i ∝ 1/‖ΔW_i‖`` with the sum 1; zero for an update that is zero: ``[k]``."""
    norms = _inner(pool).diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
    return inverse / inverse.sum()


def matched_norm(pool: Pool) -> Tensor:
    """One weight for all, with which the sum has the mean norm of the updates: ``[k]``."""
    inner = _inner(pool)
    norms = inner.diagonal().clamp(min=0).sqrt()
    total = inner.sum().clamp(min=0).sqrt()
    if float(total) <= 1e-6 * float(norms.sum()):
        raise InputError(
            "weights: method='matched_norm' needs a sum that is not zero, but these adapters cancel each other; use "
            "'equal_energy' or weights of your own"
        )
    return (norms > 0) * (norms.sum() / (norms > 0).sum() / total)


def least_interference(pool: Pool) -> Tensor:
    """Normal equations ``(Σ_i M^i / ‖ΔW_i‖²) w = Σ_i M^i e_i / ‖ΔW_i‖²``, summed over modules, with
    ``M^i_jl = ⟨ΔW_j ΔW_iᵀ, ΔW_l ΔW_iᵀ⟩``. Blocks that the Gram cache in use has are not read."""
    k = len(pool)
    matrix = torch.zeros(k, k, dtype=torch.float64)
    right = torch.zeros(k, dtype=torch.float64)
    for blocks in read_pair_blocks(pool):
        products = _products(blocks)  # [g, i, j, l]
        squares = blocks.inner().diagonal(dim1=1, dim2=2)  # ‖ΔW_i‖² [g, k]
        products = torch.where(squares[:, :, None, None] > 0, products / squares[:, :, None, None], 0.0)
        index = torch.tensor(blocks.members)
        matrix[index[:, None], index] += products.sum((0, 1))
        right[index] += products.diagonal(dim1=1, dim2=3).sum((0, 2))  # Σ_i M^i_ji  [j]
    scale = matrix.diagonal().clamp(min=0).sqrt()
    if not bool(scale.any()):
        raise InputError("weights: every update of the pool is zero, so no weight has a meaning")
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    balanced = inverse[:, None] * matrix * inverse
    values: Tensor = inverse * (torch.linalg.pinv(balanced, rtol=RTOL, hermitian=True) @ (inverse * right))
    return _shortest(values, inverse, balanced)


def _shortest(values: Tensor, inverse: Tensor, balanced: Tensor) -> Tensor:
    """The weights of least norm among those that solve the equations as well as ``values`` do. The balanced equations
    say what is singular; their own shortest solution is short in units of the updates' sizes."""
    there = inverse > 0
    spectrum, vectors = torch.linalg.eigh(balanced[there][:, there])
    free = vectors[:, spectrum <= RTOL * spectrum[-1]]  # moves that change nothing, in those units
    if not free.shape[1]:
        return values
    moves = torch.zeros(len(values), free.shape[1], dtype=torch.float64)
    moves[there] = inverse[there, None] * free
    moves = moves / moves.norm(dim=0)
    nearest: Tensor = moves @ torch.linalg.lstsq(moves, values[:, None]).solution
    return values - nearest[:, 0]


def _products(blocks: PairBlocks) -> Tensor:
    """``M^i_jl = s_j s_l s_i² tr(G^B_ii G^A_ij G^B_jl G^A_li)`` of every module: ``[g, i, j, l]``."""
    k = len(blocks.members)
    result = blocks.left.new_empty(len(blocks.modules), k, k, k)
    for i in range(k):
        # Rows of ΔW_j ΔW_iᵀ = s_j s_i B_j (A_j A_iᵀ) B_iᵀ meet those of ΔW_l ΔW_iᵀ in G^B_jl.
        across = blocks.left[:, i, i, None] @ blocks.right[:, i]  # [g, j, r, r]
        first = across[:, :, None] @ blocks.left  # [g, j, l, r, r]
        result[:, i] = (first * blocks.right[:, i, None]).sum((-1, -2))
    s = blocks.scaling
    return result * s[:, None, :, None] * s[:, None, None, :] * s[:, :, None, None].square()


METHODS: dict[str, Callable[[Pool], Tensor]] = {
    "equal_energy": equal_energy,
    "least_interference": least_interference,
    "matched_norm": matched_norm,
}
