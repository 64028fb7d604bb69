"""Linear combinations of factors by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.reference.gram import mask_columns


def combine(factors: Tensor, coefficients: Tensor, ranks: Tensor | None, rows: bool) -> Tensor:
    """``Σ_i X_i C_i [..., n, q]``, or ``Σ_i D_i A_i [..., q, n]`` with ``rows``, summed in float64."""
    x = mask_columns(factors.double().mT if rows else factors.double(), ranks)  # [..., k, n, r]
    c = coefficients.double().mT if rows else coefficients.double()  # [..., k, r, q]
    out = (x @ c).sum(-3)  # [..., n, q]
    out = out.mT if rows else out
    return out.to(torch.float64 if factors.dtype == torch.float64 else torch.float32).contiguous()
