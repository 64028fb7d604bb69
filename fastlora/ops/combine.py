"""Linear combinations of the factors of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.gram import FACTOR_DTYPES, check_ranks
from fastlora.ops.op import Op, require_dims, require_floating


def _check(factors: Tensor, coefficients: Tensor, ranks: Tensor | None, rows: bool) -> None:
    require_dims("combine", "factors", factors, "[..., k, r, n]" if rows else "[..., k, n, r]", 3)
    require_dims("combine", "coefficients", coefficients, "[..., k, q, r]" if rows else "[..., k, r, q]", 3)
    require_floating("combine", "factors", factors, FACTOR_DTYPES)
    require_floating("combine", "coefficients", coefficients, (torch.float32, torch.float64))
    *batch, k, first, second = factors.shape
    r = first if rows else second
    *batch_c, first_c, second_c = coefficients.shape
    inner = second_c if rows else first_c
    if list(batch_c) != [*batch, k] or inner != r:
        raise ValueError(
            f"combine: `coefficients` {list(coefficients.shape)} do not fit `factors` {list(factors.shape)}: "
            f"need {[*batch, k, 'q', r] if rows else [*batch, k, r, 'q']}"
        )
    check_ranks("combine", ranks, (*batch, k))


def _empty(factors: Tensor, coefficients: Tensor, ranks: Tensor | None, rows: bool) -> Tensor:
    *batch, _, first, second = factors.shape
    n, q = (second, coefficients.shape[-2]) if rows else (first, coefficients.shape[-1])
    dtype = torch.float64 if factors.dtype == torch.float64 else torch.float32
    return factors.new_empty((*batch, q, n) if rows else (*batch, n, q), dtype=dtype)


_combine = Op("combine(Tensor factors, Tensor coefficients, Tensor? ranks, bool rows) -> Tensor", _check, _empty)


def combine(factors: Tensor, coefficients: Tensor, ranks: Tensor | None = None, *, rows: bool = False) -> Tensor:
    r"""``Σ_i X_i C_i``, or ``Σ_i D_i A_i`` with ``rows=True``: the "apply" step of MATH section 1.

    Args:
        factors: ``[..., k, n, r]``, or ``[..., k, r, n]`` with ``rows=True``; any floating dtype.
        coefficients: ``[..., k, r, q]``, or ``[..., k, q, r]`` with ``rows=True``; float32 or float64.
        ranks: int64 ``[..., k]``: columns (rows) of the factors from ``ranks`` on are padding, whatever they hold.

    Returns:
        ``[..., n, q]``, or ``[..., q, n]`` with ``rows=True``: float32 (float64 for float64 factors), summed in float64
        and rounded once.

    Raises:
        TypeError, ValueError: dtype or shape, before anything is computed.

    Cost: reads every factor once, writes the result once; 2·n·k·r·q operations.
    """
    result: Tensor = _combine(factors, coefficients, ranks, rows)
    return result
