"""Batched symmetric eigendecomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.op import Op, require_dims, require_floating

NOT_FINITE, NOT_CONVERGED = 1, 2
"""What the ``info`` of a solver says of a matrix or module; 0: it is done."""


def _check(a: Tensor) -> None:
    require_dims("eigh", "a", a, "[..., n, n]", 2)
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(f"eigh: `a` must be square, got shape {tuple(a.shape)}")
    require_floating("eigh", "a", a, (torch.float32, torch.float64))


def _empty(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape[:-1]), a.new_empty(a.shape).mT, a.new_empty(a.shape[:-2], dtype=torch.int32)


_eigh = Op("eigh(Tensor a) -> (Tensor values, Tensor vectors, Tensor info)", _check, _empty)


def eigh_ex(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`eigh` that never looks at its results: ``(values, vectors, info)``.

    Args:
        a: ``[..., n, n]``, float32 or float64.

    Returns:
        ``λ [..., n]`` and ``V [..., n, n]`` as :func:`eigh`, and int32 ``info [...]``: 0 done, 1 the matrix holds NaN
        or Inf (its results are NaN), 2 not converged.

    Raises:
        TypeError, ValueError: dtype or shape, before anything is computed. Numbers never raise.

    Cost: that of :func:`eigh`, without the wait for a device that looking at results would be.
    """
    result: tuple[Tensor, Tensor, Tensor] = _eigh(a)
    return result


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of symmetric matrices, ``A = V diag(λ) Vᵀ``; drop-in for ``torch.linalg.eigh``.

    Args:
        a: ``[..., n, n]``, float32 or float64; only the lower triangle is read.

    Returns:
        ``λ [..., n]`` ascending and ``V [..., n, n]`` with eigenvectors in columns, in the dtype of ``a``. The entry of
        largest magnitude of every vector is positive. A matrix has the same bits alone and in any batch.

    Raises:
        ValueError: matrices that hold NaN or Inf, or did not converge, by index. Not raised inside ``torch.compile``,
            where their results are NaN.

    Cost: about 13·n³ operations a matrix, in batches one matrix per SIMD lane; large matrices (n ≥ 96, in float64
        n ≥ 64) at most 5·n³, the same alone and in batches, and less where eigenvalues cluster.
    """
    values, vectors, info = eigh_ex(a)
    raise_if_bad("eigh", info)
    return values, vectors


def raise_if_bad(op: str, info: Tensor) -> None:
    """Turns the ``info`` of a batched solver into one error that names the matrices."""
    if torch.compiler.is_compiling() or not bool(info.any()):
        return
    parts = []
    for code, what in ((NOT_FINITE, "hold NaN or Inf"), (NOT_CONVERGED, "did not converge")):
        hits = (info == code).nonzero().tolist()
        if hits:
            names = ", ".join("·".join(map(str, h)) or "the input" for h in hits[:8]) + (", …" if len(hits) > 8 else "")
            parts.append(f"matrices {names} {what}")
    raise ValueError(f"{op}: {'; '.join(parts)} ({op}_ex returns a code per matrix instead of raising)")
