"""Many truncated sums ``Σ w_i ΔW_i`` of one pool: what does not depend on the weights is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.dtypes import widest
from fastlora.core.factors import Side, add
from fastlora.core.sums import combine_extras, common_base
from fastlora.core.updates import Update, default_rtol, factor, with_rank_zero
from fastlora.engine.blocks import PairBlocks, read_pair_blocks
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.methods.svd import default_rank
from fastlora.runtime.progress import track

# Eigenvalues of a Gram matrix below it, relative to the largest, are rounding.
ROUNDING = 1e-14


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Modules of one group, ``R`` their stacked rank; all float64.

    With orthonormal ``Q_B``, ``Q_A``: ``[B_1/β_1 …] = Q_B left [R, R]``, ``[A_1/α_1; …] = rightᵀ Q_Aᵀ``. ``inverse``:
    ``Q_B = [B_1/β_1 …] inverse``. ``norms_B``, ``norms_A`` ``[g, k]``: the ``β_i``, ``α_i``, which keep adapters of
    different sizes apart from each other's rounding.
    """

    blocks: PairBlocks
    left: Tensor
    right: Tensor
    inverse: Tensor
    norms_B: Tensor
    norms_A: Tensor
    ranks: list[int]

    def spread(self, values: Tensor) -> Tensor:
        """One number an adapter ``[g, k]`` as one a stacked column ``[g, R]``."""
        return values.repeat_interleave(torch.tensor(self.ranks), dim=1)


class WeightedSVD:
    """The best approximations of ``Σ w_i ΔW_i`` at a rank or an energy, for any number of weights.

    Two eigendecompositions of ``R×R`` matrices a module once (``R = Σr_i``) and ``24·R²`` bytes a module; every merge
    then takes one, and no pass over the factors. Results are those of ``fastlora.merge(method="svd")`` to rounding.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.cores = [_core(blocks) for blocks in read_pair_blocks(pool, "preparing merges")]

    def merge(self, weights: Mapping[str, float], rank: int | None, energy: float | None) -> Adapter:
        """``weights``: of every adapter of the pool."""
        if rank is None and energy is None:
            rank = default_rank(self.pool)
        check_cut(rank, energy)
        terms = [(weights[name], self.pool[name]) for name in self.pool.names]
        updates: dict[str, Update] = {}
        squares: dict[str, tuple[float, float]] = {}
        for core in track(self.cores, "merging"):
            _merge(core, [w for w, _ in terms], rank, energy, updates, squares)
        kept, total = (sum(s[i] for s in squares.values()) for i in range(2))
        return Adapter(
            "svd",
            {m: updates[m] for m in self.pool.modules},
            extras=combine_extras(terms),
            base=common_base(self.pool.adapters),
            dtype=widest(a.dtype for a in self.pool.adapters),
            provenance={
                "compress": {"sum": [{"weight": w, "of": a.provenance} for w, a in terms]},
                "rank": rank,
                "energy": energy,
                "retained_energy": kept / total if total > 0 else 1.0,
            },
            notes=tuple(dict.fromkeys(n for a in self.pool.adapters for n in a.notes)),
            details={"retained_energy": {m: k / t if t > 0 else 1.0 for m, (k, t) in squares.items()}},
        )


def _core(blocks: PairBlocks) -> Core:
    ranks = [u.rank for u in blocks.updates[0]]
    left, norms_B, inverse = _root(blocks.left, ranks)
    right, norms_A, _ = _root(blocks.right, ranks)
    none = blocks.left.new_empty(0)  # the blocks themselves are not needed any more
    return Core(replace(blocks, left=none, right=none), left, right, inverse, norms_B, norms_A, ranks)


def _root(gram: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``(root, norms, inverse)`` of the stacked factors ``X = [X_i/‖X_i‖]``: ``X = Q root``, ``Q = X inverse``."""
    g, k, _, r, _ = gram.shape
    index = torch.cat([i * r + torch.arange(rank) for i, rank in enumerate(ranks)])
    stacked = gram.transpose(2, 3).reshape(g, k * r, k * r)[:, index][:, :, index]
    norms = gram.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2).sum(-1).clamp(min=0).sqrt()  # [g, k]
    scale = torch.where(norms > 0, 1.0 / norms, 0.0).repeat_interleave(torch.tensor(ranks), dim=1)
    values, vectors = ops.eigh((scale[:, :, None] * stacked * scale[:, None]).contiguous())
    kept = values > ROUNDING * values[:, -1:].clamp(min=0) if len(index) else values > 0
    size = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1.0 / size, 0.0)
    return size[:, :, None] * vectors.mT, norms, vectors * inverse[:, None]


def _merge(
    core: Core,
    weights: list[float],
    rank: int | None,
    energy: float | None,
    updates: dict[str, Update],
    squares: dict[str, tuple[float, float]],
) -> None:
    """Fills the updates and ``(kept, total)`` ``Σσ²`` of the modules of a group."""
    blocks = core.blocks
    own = torch.tensor([weights[i] for i in blocks.members], dtype=torch.float64) * blocks.scaling  # [g, k]
    balanced = core.left * core.spread(own * core.norms_B * core.norms_A)[:, None]
    middle = balanced @ core.right.mT  # ΔW = Q_B middle Q_Aᵀ
    if not bool(middle.isfinite().all()):
        raise InputError(f"the weighted sum overflows: lower the weights {weights}")
    values, vectors = ops.eigh(middle @ middle.mT)
    sigma = values.flip(-1).clamp(min=0).sqrt()
    vectors = vectors.flip(-1)
    strength = [abs(weights[i]) for i in blocks.members]
    floors = [max(u.floor * w for u, w in zip(row, strength, strict=True)) for row in blocks.updates]
    starts = torch.tensor([0, *core.ranks]).cumsum(0).tolist()
    for g, module in enumerate(blocks.modules):
        row = blocks.updates[g]
        energies = sigma[g].square()
        squares[module] = 0.0, float(energies.sum())
        count = int((sigma[g] > max(default_rtol(row) * float(sigma[g, :1].sum()), floors[g])).sum())
        if energy is not None and count:
            enough = energies[:count].cumsum(0) >= energy * energies.sum() * (1 - 1e-12)
            count = int(enough.int().argmax()) + 1 if bool(enough.any()) else count
        count = min(count, rank or count)
        if not count:
            updates[module] = with_rank_zero(row[0])
            continue
        squares[module] = float(energies[:count].sum()), squares[module][1]
        U = vectors[g, :, :count]
        T = (core.inverse[g] @ U) * core.spread(_inverse(core.norms_B[g : g + 1])).mT  # Q_B U = [B_1 …] T
        D = (U.mT @ core.left[g]) * core.spread((own * core.norms_B)[g : g + 1])  # Uᵀ ΔW = D [A_1; …]
        sides: tuple[tuple[Side, Tensor], ...] = ("B", T), ("A", D.mT)
        B, A = (
            add([factor(u, side).times(small[a:b]) for u, a, b in zip(row, starts, starts[1:], strict=False) if b > a])
            for side, small in sides
        )
        updates[module] = Update(B, A, 1.0, row[0].layout, floors[g])


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1.0 / values, 0.0)
