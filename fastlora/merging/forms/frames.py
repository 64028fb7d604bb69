"""Cores: ``ΔW_i = Q_B M_i Q_Aᵀ`` of all adapters of a module in common orthonormal frames, and back to factors.

The frames come from the Gram blocks of the stacked factors: with ``XᵀX = E Λ Eᵀ``, ``Q = X E Λ^-½`` is orthonormal,
and is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, Side, add
from fastlora.core.updates import Noise, Update, default_rtol, exact_rtol, factor, joint_noise, with_rank_zero
from fastlora.engine.blocks import PairBlocks
from fastlora.engine.stream import current
from fastlora.reference.chain import balance

# What is below it, relative to the largest eigenvalue of a Gram matrix or to the terms of a sum, is rounding.
ROUNDING = 1e-14


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """How many singular values of some modules stay: those above the noise, cut by a rank or a share of the energy.

    ``rtol``, ``floor``: float64 ``[g]``; the noise is ``max(rtol·σ_1, floor)``.
    """

    rtol: Tensor
    floor: Tensor
    rank: int | None = None
    energy: float | None = None

    def __call__(self, sigma: Tensor) -> Tensor:
        """The counts, int64 ``[g]``, for ``sigma [g, R]``, descending."""
        counts = self.above(sigma)
        if self.energy is not None and sigma.shape[1]:
            squares = sigma.square()
            enough = squares.cumsum(1) >= self.energy * squares.sum(1, keepdim=True) * (1 - 1e-12)
            wanted = torch.where(enough.any(1), enough.int().argmax(1) + 1, sigma.shape[1])
            counts = torch.minimum(counts, wanted)
        return counts if self.rank is None else counts.clamp(max=self.rank)

    def of(self, g: int) -> Cut:
        """That of the module at ``g`` alone."""
        return Cut(self.rtol[g : g + 1], self.floor[g : g + 1], self.rank, self.energy)

    def above(self, sigma: Tensor) -> Tensor:
        """How many are above the noise alone."""
        return (sigma > torch.maximum(self.rtol * sigma[:, :1].sum(1), self.floor)[:, None]).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Modules of one group, ``R`` their stacked rank; all float64.

    With orthonormal ``Q_B``, ``Q_A``: ``[B_1/β_1 …] = Q_B left [R, R]``, ``[A_1/α_1; …] = rightᵀ Q_Aᵀ``. ``inverse``:
    ``Q_B = [B_1/β_1 …] inverse``. ``norms_B``, ``norms_A`` ``[g, R]``: the ``β_i``, ``α_i``, which keep adapters of
    different sizes apart from each other's rounding, and columns of one adapter of very different sizes. A direction
    that no factor has is a row of zeros in ``left`` or ``right`` and a column of zeros in ``inverse``.
    """

    blocks: PairBlocks
    left: Tensor
    right: Tensor
    inverse: Tensor
    norms_B: Tensor
    norms_A: Tensor
    ranks: list[int]

    @staticmethod
    def of(blocks: PairBlocks) -> Frames:
        """Two eigendecompositions of ``R×R`` matrices a module; the blocks themselves are not kept."""
        ranks = [u.rank for u in blocks.updates[0]]
        left, norms_B, inverse = _root(blocks.left, ranks)
        right, norms_A, _ = _root(blocks.right, ranks)
        none = blocks.left.new_empty(0)
        return Frames(replace(blocks, left=none, right=none), left, right, inverse, norms_B, norms_A, ranks)

    def part(self, chosen: range) -> Frames:
        """Some of the modules."""
        chosen_slice = slice(chosen.start, chosen.stop)
        blocks = replace(
            self.blocks,
            modules=self.blocks.modules[chosen_slice],
            updates=self.blocks.updates[chosen_slice],
            scaling=self.blocks.scaling[chosen_slice],
        )
        left, right, inverse = self.left[chosen_slice], self.right[chosen_slice], self.inverse[chosen_slice]
        return Frames(blocks, left, right, inverse, self.norms_B[chosen_slice], self.norms_A[chosen_slice], self.ranks)

    def scales(self, weights: Sequence[float]) -> Tensor:
        """``w_i s_i`` of every module, given the weights of the pool: ``[g, k]``."""
        members = torch.tensor([weights[i] for i in self.blocks.members], dtype=torch.float64)
        return members * self.blocks.scaling

    def spread(self, values: Tensor) -> Tensor:
        """One number an adapter ``[g, k]`` as one a stacked column ``[g, R]``."""
        return values.repeat_interleave(torch.tensor(self.ranks), dim=1)

    def total(self, scales: Tensor) -> Tensor:
        """``Σ_i M_i``, where ``M_i`` is ``scales_i B_i A_i``: ``[g, R, R]``."""
        return (self.left * (self.spread(scales) * self.norms_B * self.norms_A)[:, None]) @ self.right.mT

    def cores(self, scales: Tensor, count: int) -> Tensor:
        """The ``M_i`` of ``scales_i B_i A_i``, one for each of the ``count`` adapters of the pool: ``[g, k, R, R]``."""
        g, R = self.left.shape[:2]
        result = self.left.new_zeros(g, count, R, R)
        sizes = self.spread(scales) * self.norms_B * self.norms_A
        end = 0
        for member, rank in zip(self.blocks.members, self.ranks, strict=True):
            start, end = end, end + rank
            columns = self.left[:, :, start:end] * sizes[:, None, start:end]
            torch.matmul(columns, self.right[:, :, start:end].mT, out=result[:, member])
        return result

    def sides(self, scales: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``M_i = L_i R_iᵀ`` of ``scales_i B_i A_i`` for the ``count`` adapters of the pool: ``[g, k, R, r]`` twice,
        with ``r`` the largest rank and columns of zeros where an adapter has fewer."""
        g, R = self.left.shape[:2]
        most = max(self.ranks, default=0)
        left, right = self.left.new_zeros(2, g, count, R, most)
        sizes = self.spread(scales) * self.norms_B * self.norms_A
        end = 0
        for member, rank in zip(self.blocks.members, self.ranks, strict=True):
            start, end = end, end + rank
            left[:, member, :, :rank] = self.left[:, :, start:end] * sizes[:, None, start:end]
            right[:, member, :, :rank] = self.right[:, :, start:end]
        return left, right

    def stacks(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """``[B_1 | B_2 | …] = Q_B X`` and ``[A_1; A_2; …]ᵀ = Q_A Y`` as they are stored: ``X``, ``Y`` ``[g, R, R]``,
        zero for adapters whose scale is."""
        counted = self.spread((scales != 0).double())
        return self.left * (self.norms_B * counted)[:, None], self.right * (self.norms_A * counted)[:, None]

    def cut(
        self, weights: Sequence[float], rank: int | None, energy: float | None, *, significant: bool = False
    ) -> Cut:
        """Where sums with these weights of the pool are cut: at the rounding of the arithmetic, a rank, an energy.

        Stored numbers are exact, unless ``significant``: then the rounding of the stored dtypes is a floor too, for
        what gives directions a length that they did not have.
        """
        noises, rows = self.noises(weights), self.blocks.updates
        floors = [noise.floor if significant else noise.rounding for noise in noises]
        on_gpu = current() is not None
        rtol = [default_rtol(row) if significant else exact_rtol(row, on_gpu=on_gpu) for row in rows]
        rtol_of, floor_of = (torch.tensor(values, dtype=torch.float64) for values in (rtol, floors))
        return Cut(rtol_of, torch.maximum(floor_of, self.rounding(self.scales(weights))), rank, energy)

    def noises(self, weights: Sequence[float]) -> list[Noise]:
        """Of sums with these weights, module by module."""
        strength = [weights[i] for i in self.blocks.members]
        rows = self.blocks.updates
        return [joint_noise(u.noise.scaled(w) for u, w in zip(row, strength, strict=True)) for row in rows]

    def rounding(self, scales: Tensor) -> Tensor:
        """The size that a sum of the cores of ``scales_i B_i A_i`` has where it cancels and only rounding is left:
        ``[g]``."""
        sizes = (self.spread(scales) * self.norms_B * self.norms_A).abs()
        largest = [piece.amax(1) for piece in torch.split_with_sizes(sizes, self.ranks, 1) if piece.shape[1]]
        return ROUNDING * torch.stack(largest).sum(0) if largest else sizes.new_zeros(len(sizes))

    def right_of(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """``core Q_Aᵀ = D diag(c) [A_1; …]`` for ``core [g, R, R]``: ``D [g, R, R]`` and ``c [g, R]``."""
        squares = self.right.square().sum(2)  # Λ of the A side, since E is orthonormal
        inverse = self.right.mT * _inverse(squares)[:, None]
        return core @ inverse.mT, _inverse(self.norms_A)

    def right_of_total(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`right_of` of :meth:`total`, without the way over ``Q_A``."""
        return self.left, self.spread(scales) * self.norms_B

    def updates(
        self, core: Tensor, right: tuple[Tensor, Tensor], cut: Cut, noises: Sequence[Noise]
    ) -> dict[str, tuple[Update, float, float]]:
        """``Q_B core Q_Aᵀ`` in factors, with the ``Σσ²`` that is kept and that of all; ``right``: :meth:`right_of`,
        ``noises``: :meth:`noises`."""
        D, columns = right
        values, vectors = ops.eigh(core @ core.mT)
        sigma, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
        counts = cut(sigma).tolist()
        # All columns of all modules at once: the bits of one do not depend on how many another keeps.
        columns_B = self.inverse @ vectors * _inverse(self.norms_B)[:, :, None]
        columns_A = D.mT @ vectors * columns[:, :, None]
        result = {}
        for g, module in enumerate(self.blocks.modules):
            squares, row, count = sigma[g].square(), self.blocks.updates[g], counts[g]
            if not count:
                result[module] = with_rank_zero(row[0]), 0.0, float(squares.sum())
                continue
            B = self._stacked(row, "B", columns_B[g, :, :count].clone())
            A = self._stacked(row, "A", columns_A[g, :, :count].clone())
            update = Update(B, A, 1.0, row[0].layout, noises[g])
            result[module] = update, float(squares[:count].sum()), float(squares.sum())
        return result

    def columns(self, g: int, small: Tensor) -> Factor:
        """``Q_B small`` of the module at ``g``, ``small [R, q]``."""
        T = (self.inverse[g] @ small) * _inverse(self.norms_B[g])[:, None]  # Q_B small = [B_1 …] T
        return self._stacked(self.blocks.updates[g], "B", T)

    def _stacked(self, row: Sequence[Update], side: Side, small: Tensor) -> Factor:
        """``[X_1 | X_2 | …] small`` of one side, ``small [R, q]``."""
        pieces = torch.split_with_sizes(small, self.ranks)
        return add([factor(u, side).times(piece) for u, piece in zip(row, pieces, strict=True) if u.rank])


def _root(gram: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``(root, norms, inverse)`` of the stacked factors ``X = [X_i/‖X_i‖]``: ``X = Q root``, ``Q = X inverse``.

    ``norms [g, R]``: of each column that of its adapter, times a power of two where it is far shorter than others.
    """
    g, k, _, r, _ = gram.shape
    index = torch.cat([i * r + torch.arange(rank) for i, rank in enumerate(ranks)])
    stacked = gram.transpose(2, 3).reshape(g, k * r, k * r)
    if len(index) < k * r:
        stacked = stacked[:, index][:, :, index]
    norms = gram.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2).sum(-1).clamp(min=0).sqrt()  # [g, k]
    norms = norms.repeat_interleave(torch.tensor(ranks), dim=1)
    norms = norms * balance(stacked.diagonal(dim1=1, dim2=2) * _inverse(norms).square())
    scale = _inverse(norms)
    values, vectors = ops.eigh((scale[:, :, None] * stacked * scale[:, None]).contiguous())
    kept = values > ROUNDING * values[:, -1:].clamp(min=0) if len(index) else values > 0
    size = torch.where(kept, values, 0.0).sqrt()
    inverse = _inverse(size)
    return size[:, :, None] * vectors.mT, norms, vectors * inverse[:, None]


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1.0 / values, 0.0)
