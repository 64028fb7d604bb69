"""Tiles of ``ΔW`` by definition, and what rules on its elements need to know of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BITS = 16  # of a magnitude that one pass decides


def tile(
    factors: Sequence[tuple[Tensor, Tensor] | None], rows: slice, columns: slice, shape: tuple[int, int]
) -> Tensor:
    """``B_i[rows] A_i[:, columns]`` of all adapters of a module ``[n, m]``: float64 ``[k, rows, columns]``.

    ``factors``: ``(B_i, A_i)``, weight and scaling inside, or ``None`` for an update of zero.
    """
    pieces = [None if pair is None else pair[0].double()[rows] @ pair[1].double()[:, columns] for pair in factors]
    size = [len(range(*part.indices(length))) for part, length in zip((rows, columns), shape, strict=True)]
    device = next((pair[0].device for pair in factors if pair is not None), None)
    zero = torch.zeros(*size, dtype=torch.float64, device=device)
    return torch.stack([zero if piece is None else piece for piece in pieces])


def kth_magnitudes(tiles: Iterable[Tensor], ranks: Sequence[int]) -> Tensor:
    """The exact ``rank``-th largest ``|x|`` of every adapter, over all tiles ``[k, rows, columns]``: float64 ``[k]``.

    ``ranks``: ``[k]``, from 1 on; infinity for a rank of 0. ``tiles`` is gone through four times and nothing of it is
    kept: floats that are not negative order as integers do, so every pass counts the values of 16 bits more, from the
    highest on, among the elements that agree with what is known (MATH section 7).
    """
    upper_bits = [0] * len(ranks)
    left = list(ranks)  # the rank among the elements whose upper bits are those found
    for shift in range(64 - BITS, -1, -BITS):
        counts = torch.zeros(len(ranks), 2**BITS, dtype=torch.int64)
        for values in tiles:
            bits = values.abs().view(torch.int64)
            for i, row in enumerate(bits.flatten(1)):
                digits = row >> shift
                same = digits[(digits >> BITS) == upper_bits[i]] & (2**BITS - 1)
                counts[i] += torch.bincount(same, minlength=2**BITS).cpu()
        above = counts.flip(1).cumsum(1)  # elements whose digit is at least 2^16 − 1 − index
        for i, rank in enumerate(left):
            if rank:
                index = int((above[i] >= rank).int().argmax())
                left[i] -= int(above[i, index - 1]) if index else 0
                upper_bits[i] = (upper_bits[i] << BITS) | (2**BITS - 1 - index)
    magnitudes = torch.tensor(upper_bits, dtype=torch.int64).view(torch.float64)
    return torch.where(torch.tensor(ranks) > 0, magnitudes, torch.inf)
