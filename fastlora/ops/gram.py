"""Gram blocks of the factors of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops.op import Op, require_dims, require_floating

FACTOR_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCKS = ("full", "pairs", "chain", "diagonal")


def blocks_of(kind: str, k: int) -> list[tuple[int, int]]:
    """The blocks ``(i, j)``, ``i <= j``, that are summed; ``full`` mirrors them into the other triangle.

    ``chain``: the diagonal, the neighbours ``(i, i+1)`` and the first row: what MATH (4)–(10) need.
    """
    if kind not in BLOCKS:
        raise InputError(f"gram: blocks={kind!r} does not exist: use one of {', '.join(BLOCKS)}")
    every = [(i, j) for i in range(k) for j in range(i, k)]
    if kind == "diagonal":
        return [(i, j) for i, j in every if i == j]
    if kind == "chain":
        return [(i, j) for i, j in every if j <= i + 1 or i == 0]
    return every


def _check(factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> None:
    require_dims("gram", "factors", factors, "[..., k, r, n]" if rows else "[..., k, n, r]", 3)
    require_floating("gram", "factors", factors, FACTOR_DTYPES)
    check_ranks("gram", ranks, factors.shape[:-2])
    blocks_of(blocks, 1)


def _empty(factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> Tensor:
    *batch, k, first, second = factors.shape
    r = first if rows else second
    return factors.new_empty((*batch, k, k, r, r), dtype=torch.float64)


def check_ranks(op: str, ranks: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises :class:`ValueError` for ``ranks`` that are not int64 of this shape."""
    if ranks is not None and (ranks.shape != shape or ranks.dtype != torch.int64):
        raise ValueError(f"{op}: `ranks` must be int64 {list(shape)}, got {ranks.dtype} {list(ranks.shape)}")


_gram = Op("gram(Tensor factors, Tensor? ranks, str blocks, bool rows) -> Tensor", _check, _empty)


def gram(factors: Tensor, ranks: Tensor | None = None, *, blocks: str = "full", rows: bool = False) -> Tensor:
    r"""Gram blocks ``G_ij = X_iᵀ X_j`` of tall factors, MATH section 1.

    Args:
        factors: ``[..., k, n, r]``, the ``k`` factors of each module (``B`` sides), or ``[..., k, r, n]`` with
            ``rows=True`` (``A`` sides, ``G_ij = A_i A_jᵀ``). float16, bfloat16, float32 or float64.
        ranks: int64 ``[..., k]``: columns (rows) from ``ranks`` on are padding, whatever they hold. ``None``: none.
        blocks: ``"full"``, ``"pairs"`` (``i <= j``), ``"chain"`` (diagonal, neighbours, first row), ``"diagonal"``.

    Returns:
        float64 ``[..., k, k, r, r]``; blocks that were not asked for, and padding, are zero. Diagonal blocks are
        exactly symmetric. Products and sums are float64, so half-precision inputs are as good as exact; on a GPU, those
        with ``n >= 1024`` are summed on tensor cores, to 2⁻²⁹ of ``‖x‖‖y‖``.

    Raises:
        TypeError, ValueError: dtype or shape, before anything is computed.

    Cost: reads every factor once, and on tensor cores those with more than diagonal blocks twice; 2·n·r² operations a
    block.
    """
    result: Tensor = _gram(factors, ranks, blocks, rows)
    return result
