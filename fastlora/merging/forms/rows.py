"""Rules on rows: ``ΔW_i = Q_B U (Uᵀ L_i A_i)`` in a common left basis, the elements of ``[c, m]`` matrices merged.

Beside the factors, one such matrix an adapter is there at a time, and a piece of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Factor, device_of
from fastlora.core.updates import Noise, Update, with_rank_zero
from fastlora.engine.materialise import materialise_factor
from fastlora.merging.forms.frames import Cut, Frames
from fastlora.runtime.memory import batch_bytes

PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One module in a left basis ``U [R, c]``: the ``x_i = Uᵀ L_i A_i [c, m]`` of its adapters, ``ΔW_i = Q_B U x_i``.

    ``coefficients``: ``Uᵀ L_i [c, r_i]``, scale inside; ``factors``: the ``A_i [r_i, m]`` in float64.
    """

    coefficients: list[Tensor]
    factors: list[Tensor]
    shape: tuple[int, int]

    @staticmethod
    def of(frames: Frames, g: int, scales: Tensor, basis: Tensor) -> Rows:
        """The rows of the module at ``g`` of ``frames``, for ``scales_i B_i A_i``."""
        row = frames.blocks.updates[g]
        sizes = frames.spread(scales)[g] * frames.norms_B[g]
        pieces = torch.split_with_sizes(basis.mT @ (frames.left[g] * sizes), frames.ranks, 1)
        factors = [materialise_factor(u.A, torch.float64).cpu() for u in row]
        return Rows(list(pieces), factors, (basis.shape[1], row[0].shape[1]))

    def elements(self, i: int) -> Tensor:
        """``x_i [c, m]``."""
        return self.coefficients[i] @ self.factors[i]

    def merged(self, rule: Callable[..., Tensor]) -> Tensor:
        """``rule(x [k, c, columns], first_column=…)`` for all columns: ``[c, m]``."""
        c, m = self.shape
        width = max(1, batch_bytes(PIECE_BYTES) // (8 * max(1, c) * len(self.factors)))
        pieces = [
            rule(
                torch.stack([S @ A[:, i : i + width] for S, A in zip(self.coefficients, self.factors, strict=True)]),
                first_column=i,
            )
            for i in range(0, m, width)
        ]
        return torch.cat(pieces, 1)


def update_of(
    frames: Frames, g: int, basis: Tensor, rows: Tensor, cut: Cut, noise: Noise
) -> tuple[Update, tuple[float, float]]:
    """``Q_B U rows`` cut: ``B`` from the stored factors, ``A`` a new matrix; and the ``Σσ²`` kept and of all."""
    like = frames.blocks.updates[g]
    if not len(rows):
        return with_rank_zero(like[0]), (0.0, 0.0)
    values, vectors = ops.eigh((rows @ rows.mT)[None].contiguous())
    sigma, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors[0].flip(-1)
    count, squares = int(cut(sigma)), sigma[0].square()
    energies = float(squares[:count].sum()), float(squares.sum())
    if not count:
        return with_rank_zero(like[0]), energies
    E = vectors[:, :count]
    dtype = torch.float64 if torch.float64 in {d for u in like for d in u.dtypes()} else torch.float32
    place = device_of([[u.A for u in like]])
    A = Factor.of("A", (E.mT @ rows).to(dtype).to(place).contiguous())
    return Update(frames.columns(g, basis @ E), A, 1.0, like[0].layout, noise), energies
