"""Batched singular value decomposition of small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops.eigh import raise_if_bad
from fastlora.ops.op import Op, require_dims, require_floating


def _check(a: Tensor) -> None:
    require_dims("svd", "a", a, "[..., p, q]", 2)
    require_floating("svd", "a", a, (torch.float32, torch.float64))


def _empty(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *batch, p, q = a.shape
    m = min(p, q)
    info = a.new_empty(batch, dtype=torch.int32)
    return a.new_empty((*batch, m, p)).mT, a.new_empty((*batch, m)), a.new_empty((*batch, m, q)), info


_svd = Op("svd(Tensor a) -> (Tensor u, Tensor s, Tensor vh, Tensor info)", _check, _empty)


def svd_ex(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`svd` that never looks at its results: ``(U, S, Vh, info)``.

    Args:
        a: ``[..., p, q]``, float32 or float64.

    Returns:
        ``U [..., p, m]``, ``σ [..., m]`` and ``Vᵀ [..., m, q]`` as :func:`svd`, and int32 ``info [...]`` as in
        :func:`fastlora.ops.eigh_ex`.

    Raises:
        TypeError, ValueError: dtype or shape, before anything is computed. Numbers never raise.

    Cost: that of :func:`svd`, without the wait for a device that looking at results would be.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _svd(a)
    return result


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Thin singular value decomposition ``A = U diag(σ) Vᵀ``; drop-in for
    ``torch.linalg.svd(a, full_matrices=False)`` on small matrices.

    Args:
        a: ``[..., p, q]``, float32 or float64, ``p, q`` up to a few hundred.

    Returns:
        ``U [..., p, m]``, ``σ [..., m]`` descending, ``Vᵀ [..., m, q]``, ``m = min(p, q)``, in the dtype of ``a``.
        ``U`` and ``V`` have orthonormal columns also where ``A`` is rank-deficient or zero. Small singular values of
        graded matrices are accurate relative to themselves within limits (one-sided Jacobi): down to 7e-15 of the
        largest in float32. In float64 there is no limit for matrices of up to 31, nor where rows are graded or columns
        ascend; of larger ones whose columns descend, or lie in mixed order, those below 1e-12 of the largest lose it
        (1e-10 at a ratio of 1e-15, all digits at 1e-30). Same bits alone and in any batch. Of plain torch neither holds
        in float64: there the error of every value is that of the largest.

    Raises:
        ValueError: matrices that hold NaN or Inf, or did not converge, by index (not inside ``torch.compile``).

    Cost: about 6·p·m² operations a sweep, 5 to 10 sweeps; 1 to 3 after an eigendecomposition of ``AᵀA`` in float64
        where m ≥ 48 (in float64 m ≥ 32). Batches run one matrix per SIMD lane.
    """
    u, s, vh, info = svd_ex(a)
    raise_if_bad("svd", info)
    return u, s, vh
