"""What a decomposition makes of its basis: coefficients of the shared and unique parts, MATH (7)–(10)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.coefficients import Coefficients


def coefficients(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: Coefficients
) -> None:
    """Fills ``out`` from the Gram blocks ``projected [g, k, k, r, r]`` (``i <= j``) and ``other [g, k, r, r]``, and
    ``basis [g, k, r, w]``. ``scaling [g, k]``: the ``s_i``; ``strength [g, k]``: of the removals."""
    k, movers = projected.shape[1], out.removal.shape[2]
    H = basis[:, 0, None].mT @ projected[:, 0]
    for j in range(1, movers):
        row = [projected[:, i, j].mT if i < j else projected[:, j, i] for i in range(k)]
        H += basis[:, j, None].mT @ torch.stack(row, 1)
    own = projected.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    norms = (own * other).sum((-1, -2)).clamp(min=0).sqrt() * scaling.abs()
    shared = ((H.mT @ H) * other).sum((-1, -2)).clamp(min=0).sqrt() * scaling.abs()
    total = shared.sum(1, keepdim=True)
    omega = torch.where(total > 0, shared / total, 0.0)
    out.H.copy_(H)
    out.norms.copy_(norms)
    out.shared.copy_(shared)
    out.removal.copy_(-strength[:, :, None, None, None] * (basis[:, None, :movers] @ H[:, :, None]))
    out.mixing.copy_((omega * scaling)[:, :, None, None] * H)
