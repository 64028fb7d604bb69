"""The part of an update that its own inputs need and those of others do not, as dense matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def input_filter(A: Tensor, own: Tensor, others: Sequence[Tensor], mu: float, ridge: float) -> Tensor:
    """``A C_t (C_t + μ Σ_j C_j + εI)⁻¹``: ``A [r, m]``, rows of inputs ``[N, m]``, ``C = XᵀX/N``.

    ``ε = ridge · tr(C_t + μ Σ_j C_j)/m``. Where that is 0, no input is seen, and nothing is left.
    """
    m = A.shape[1]

    def covariance(rows: Tensor) -> Tensor:
        return rows.double().mT @ rows.double() / max(len(rows), 1)

    wanted = covariance(own)
    total = wanted + mu * sum((covariance(x) for x in others), torch.zeros(m, m, dtype=torch.float64))
    epsilon = ridge * float(total.trace()) / m
    if epsilon == 0.0:
        return torch.zeros_like(A, dtype=torch.float64)
    whole = total + epsilon * torch.eye(m, dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(whole, (A.double() @ wanted).mT)
    return solved.mT
