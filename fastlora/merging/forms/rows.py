"""Rules on rows: ``ΔW_i = Q_B U (Uᵀ L_i A_i)`` in a common left basis, the elements of ``[c, m]`` matrices merged.

Beside the factors, one such matrix an adapter is there at a time, and a few rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, device_of
from fastlora.core.updates import Noise, Update, with_rank_zero
from fastlora.engine.materialise import materialise_factor
from fastlora.merging.forms.frames import Cut, Frames

# Rows that are formed at once. Always as many: products of other shapes may be summed in another order, and an element
# must have the same bits whenever it is formed, or thresholds break.
ROWS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One module in a left basis ``U [R, c]``: the ``x_i = Uᵀ L_i A_i [c, m]`` of its adapters, ``ΔW_i = Q_B U x_i``.

    ``coefficients``: ``Uᵀ L_i [c, r_i]``, scale inside; ``factors``: the ``A_i [r_i, m]`` in float64.
    """

    coefficients: list[Tensor]
    factors: list[Tensor]
    shape: tuple[int, int]

    @staticmethod
    def of(frames: Frames, g: int, scales: Tensor, basis: Tensor, chosen: Sequence[int]) -> Rows:
        """The rows of the module at ``g`` of ``frames``, for ``scales_i B_i A_i`` of the ``chosen`` adapters of the
        pool; zeros for one that lacks the module."""
        row = frames.blocks.updates[g]
        sizes = frames.spread(scales)[g] * frames.norms_B[g]
        pieces = torch.split_with_sizes(basis.mT @ (frames.left[g] * sizes), frames.ranks, 1)
        place = {member: i for i, member in enumerate(frames.blocks.members)}
        c, m = basis.shape[1], row[0].shape[1]
        coefficients = [pieces[place[i]] if i in place else basis.new_zeros(c, 0) for i in chosen]
        factors = [
            materialise_factor(row[place[i]].A, torch.float64).cpu() if i in place else basis.new_zeros(0, m)
            for i in chosen
        ]
        return Rows(coefficients, factors, (c, m))

    def whole(self, i: int) -> Tensor:
        """``x_i``: ``[1, c, m]``."""
        factor = self.factors[i]
        return torch.cat([rows @ factor for rows in torch.split(self.coefficients[i], ROWS)])[None]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Some rows of all adapters after the other: the first row, and ``[1, k, rows, m]``."""
        for i, pieces in enumerate(zip(*(torch.split(S, ROWS) for S in self.coefficients), strict=True)):
            yield ROWS * i, torch.stack([S @ A for S, A in zip(pieces, self.factors, strict=True)])[None]


def update_of(
    frames: Frames, g: int, basis: Tensor, rows: Tensor, cut: Cut, noise: Noise
) -> tuple[Update, float, float]:
    """``Q_B U rows`` cut: ``B`` from the stored factors, ``A`` a new matrix; and the ``Σσ²`` kept and of all."""
    like = frames.blocks.updates[g]
    if not len(rows):
        return with_rank_zero(like[0]), 0.0, 0.0
    values, vectors = ops.eigh((rows @ rows.mT)[None].contiguous())
    sigma, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors[0].flip(-1)
    count, squares = int(cut(sigma)), sigma[0].square()
    energies = float(squares[:count].sum()), float(squares.sum())
    if not count:
        return with_rank_zero(like[0]), *energies
    E = vectors[:, :count]
    dtype = torch.float64 if torch.float64 in {d for u in like for d in u.dtypes()} else torch.float32
    place = device_of([[u.A for u in like]])
    A = Factor.of("A", (E.mT @ rows).to(dtype).to(place).contiguous())
    return Update(frames.columns(g, basis @ E), A, 1.0, like[0].layout, noise), *energies
