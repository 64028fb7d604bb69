"""peft's ``svd_clamp``: the factors of a result without their largest entries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError


def check_quantile(quantile: float) -> None:
    """Refuses what is no quantile, or one that would leave no entries."""
    if not isinstance(quantile, int | float) or not 0.5 <= quantile <= 1:
        raise InputError(f"svd_clamp={quantile!r}: a quantile of at least 0.5 and at most 1 is needed")


def clamped(B: Tensor, A: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """``U S`` and ``Vᵀ`` of ``B A = U S Vᵀ``, with the entries of both cut at ``±`` their joint quantile.

    ``B [n, r, …]``, ``A [r, m, …]``. The quantile is that of all entries and their negatives: singular vectors have no
    sign of their own, and peft, which takes that of the entries, depends on the signs that it gets. In float64,
    ``O((n + m) r²)``.
    """
    left, R = torch.linalg.qr(B.double().flatten(1))
    right, L = torch.linalg.qr(A.double().flatten(1).mT)
    U, S, Vh = torch.linalg.svd(R @ L.mT, full_matrices=False)
    scaled, across = left @ (U * S), Vh @ right.mT
    entries = torch.cat([scaled.flatten(), across.flatten()])
    most = _quantile(torch.cat([entries, -entries]), quantile)
    rank = min(len(S), B.shape[1])
    shapes = (B.shape[0], rank, *B.shape[2:]), (rank, *A.shape[1:])
    return (
        scaled.clamp(-most, most).to(B.dtype).reshape(shapes[0]),
        across.clamp(-most, most).to(A.dtype).reshape(shapes[1]),
    )


def _quantile(values: Tensor, quantile: float) -> float:
    """:func:`torch.quantile` for any number of values."""
    ordered = values.sort().values
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))
