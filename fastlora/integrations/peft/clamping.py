"""peft's ``svd_clamp``: the factors of a result without their largest entries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError


def check_quantile(quantile: float) -> None:
    """Refuses what is no quantile."""
    if not isinstance(quantile, int | float) or not 0 <= quantile <= 1:
        raise InputError(f"svd_clamp={quantile!r}: a quantile between 0 and 1 is needed")


def clamped(B: Tensor, A: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """``U S`` and ``Vᵀ`` of ``B A = U S Vᵀ``, with the entries of both cut at ``±`` their joint quantile.

    ``B [n, r, …]``, ``A [r, m, …]``. Signs of singular vectors do not matter. In float64, ``O((n + m) r²)``.
    """
    left, R = torch.linalg.qr(B.double().flatten(1))
    right, L = torch.linalg.qr(A.double().flatten(1).mT)
    U, S, Vh = torch.linalg.svd(R @ L.mT, full_matrices=False)
    scaled, across = left @ (U * S), Vh @ right.mT
    most = _quantile(torch.cat([scaled.flatten(), across.flatten()]), quantile)
    shares = (scaled.clamp(-most, most), across.clamp(-most, most))
    return shares[0].to(B.dtype).reshape(B.shape), shares[1].to(A.dtype).reshape(A.shape)


def _quantile(values: Tensor, quantile: float) -> float:
    """:func:`torch.quantile` for any number of values."""
    ordered = values.sort().values
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))
