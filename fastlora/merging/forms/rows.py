"""Rules on rows: ``ΔW_i = Q_B U x_i`` in a common left basis, the elements of the ``x_i = C_i A_i [c, m]`` merged.

The ``x_i`` are updates themselves, with a thin ``C_i = Uᵀ L_i`` on the left: the op ``merge_tiles`` forms them tile by
tile, and only the merged rows are there as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, device_of
from fastlora.core.updates import Noise, Update, with_rank_zero
from fastlora.engine.checks import LARGEST
from fastlora.engine.materialise import materialise_factor
from fastlora.errors import InputError
from fastlora.merging.forms.frames import Cut, Frames
from fastlora.merging.forms.result import too_large
from fastlora.merging.forms.tile_rules import Rule, resolved
from fastlora.merging.forms.tile_tasks import FLOAT32_RANGE, stored_source
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import TileOutputs, TileTask


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Modules in left bases ``U``, the left singular vectors of ``[w_1ΔW_1 | w_2ΔW_2 | …]``.

    ``bases [g, R, R]``: the ``U`` in the frame ``Q_B``, of whose columns the first ``counts [g]`` are no rounding.
    ``coefficients [g, R, R]``: ``[C_1 | C_2 | …]``, weights and scales inside.
    """

    frames: Frames
    bases: Tensor
    counts: list[int]
    coefficients: Tensor

    @staticmethod
    def of(frames: Frames, weights: Sequence[float]) -> Rows:
        """The bases for weights of the pool. Raises :class:`InputError` where updates overflow."""
        sides = frames.left * (frames.spread(frames.scales(weights)) * frames.norms_B)[:, None]
        pieces = (x.split_with_sizes(frames.ranks, 2) for x in (sides * frames.norms_A[:, None], frames.right))
        # M_i = L_i R_iᵀ with R_i = Q T: Q has orthonormal columns, and L_i Tᵀ as good digits as the core M_i.
        beside = torch.cat([L @ torch.linalg.qr(R, mode="r").R.mT for L, R in zip(*pieces, strict=True)], 2)
        if not bool((beside.abs() <= LARGEST).all()):
            raise InputError(f"the weighted updates overflow: lower the weights {list(weights)}")
        values, vectors = ops.eigh(beside @ beside.mT)
        bases = vectors.flip(-1)
        counts = frames.cut(weights, None, None).above(values.flip(-1).clamp(min=0).sqrt())
        return Rows(frames, bases, counts.tolist(), bases.mT @ sides)

    def merged(self, g: int, rule: Rule, chosen: Sequence[int], names: Sequence[str]) -> Tensor:
        """What a rule makes of the rows of the module at ``g``, float64 ``[c, m]``, for the ``chosen`` adapters of the
        pool, called ``names``; one that lacks the module is zero."""
        task, module = self._task(g, chosen), self.frames.blocks.modules[g]
        one = [1.0] * len(chosen)
        rows = torch.empty(task.shape, dtype=torch.float64)
        if not len(rows):
            return rows
        told = merge_tiles.merge(task, resolved(rule, task, one, names, module), TileOutputs(dense=rows))
        if not told.finite or not told.square <= LARGEST**2:
            raise too_large("knots", module)
        return rows

    def _task(self, g: int, chosen: Sequence[int]) -> TileTask:
        blocks, c = self.frames.blocks, self.counts[g]
        pieces = torch.split_with_sizes(self.coefficients[g, :c], self.frames.ranks, 1)
        place = {member: i for i, member in enumerate(blocks.members)}
        pairs: list[tuple[Tensor, Tensor] | None] = []
        scales = []
        for i in chosen:
            A, scale = _right(blocks.updates[g][place[i]].A) if i in place else (None, 0.0)
            pairs.append(None if A is None else (pieces[place[i]], A))
            scales.append(scale)
        return TileTask(pairs, scales, (c, blocks.updates[g][0].shape[1]), torch.float64)

    def update(self, g: int, rows: Tensor, cut: Cut, noise: Noise) -> tuple[Update, float, float]:
        """``Q_B U rows`` cut: ``B`` from the stored factors, ``A`` a new matrix; and the ``Σσ²`` kept and of all."""
        like, basis = self.frames.blocks.updates[g], self.bases[g, :, : len(rows)]
        if not len(rows):
            return with_rank_zero(like[0]), 0.0, 0.0
        gram = rows @ rows.mT
        values, vectors = ops.eigh(gram[None].contiguous())
        sigma = values.flip(-1).clamp(min=0).sqrt()
        count, squares = int(cut(sigma)), sigma[0].square()
        energies = float(squares[:count].sum()), float(squares.sum())
        if not count:
            return with_rank_zero(like[0]), *energies
        dtype = torch.float64 if torch.float64 in {d for u in like for d in u.dtypes()} else torch.float32
        size, (least, most) = float(sigma[0, 0]), FLOAT32_RANGE
        if not least <= size <= most:  # the coefficients of B are float64, and hold any size
            unit = 2.0 ** math.floor(math.log2(size))
            basis, rows = basis * unit, rows / unit
        there = gram.diagonal().nonzero()[:, 0]  # rules trim whole rows, of short directions
        if count == len(there):
            basis, new = basis[:, there], rows.to(dtype).index_select(0, there)
        else:
            E = vectors[0].flip(-1)[:, :count]
            basis, new = basis @ E, (E.mT @ rows).to(dtype)
        A = Factor.of("A", new.to(device_of([[u.A for u in like]])))
        return Update(self.frames.columns(g, basis), A, 1.0, like[0].layout, noise), *energies


def _right(factor: Factor) -> tuple[Tensor, float]:
    """An ``A [r, m]`` as it is stored, and its scale; in float64 where it has to be computed. In this machine's
    memory."""
    matrix, scale = stored_source(factor) or (materialise_factor(factor, torch.float64), 1.0)
    return matrix.cpu(), scale
