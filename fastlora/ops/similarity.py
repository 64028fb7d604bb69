"""``similarity``: inner products of all pairs of updates of one module, and how much their column spaces share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops import dispatch


def similarity(left: Tensor, right: Tensor, starts: Tensor, kept: Tensor, *, split: int = 0) -> tuple[Tensor, Tensor]:
    r"""``inner[i, j] = ⟨ΔW_i, ΔW_j⟩`` and ``shared[i, j] = ‖U_iᵀU_j‖_F²`` of updates ``ΔW_i = U_i R_i``.

    With orthonormal ``U_i [n, q_i]``, MATH (13) and (14) of all pairs come from two products of narrow matrices::

        inner[i, j]  = Σ_ab (U_iᵀU_j)_ab (R_iR_jᵀ)_ab
        shared[i, j] = Σ_ab (U_iᵀU_j)_ab²             a < kept_i, b < kept_j

    Args:
        left: float32 ``[n, Σq]``: the ``U_i`` side by side. right: float32 ``[m, Σq]``: the ``R_iᵀ``.
        starts: int64 ``[k + 1]``, on the host: first column of each, and their number.
        kept: int64 ``[k]``, on the host: the first columns of ``U_i`` that count in ``shared``.
        split: 0 for all pairs; ``s`` for those of ``i < s`` with ``j ≥ s`` alone, the others are 0.

    Returns:
        ``inner`` and ``shared``, float64 ``[k, k]``, symmetric. Products are float32: an error of about
        ``1e-7·‖ΔW_i‖‖ΔW_j‖``. The bits of a pair depend on its two updates, the instruction set and the backend alone.

    Raises:
        TypeError, ValueError: dtype or shape.

    Cost: ``(n + m)·(Σq)²`` operations; no matrix larger than a tile but the results.
    """
    k, width = len(kept), left.shape[-1]
    for name, x in (("left", left), ("right", right)):
        if x.dtype != torch.float32:
            raise TypeError(f"similarity: {name} must be float32, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] != width:
            raise ValueError(f"similarity: {name} must be [length, {width}], got {list(x.shape)}")
    for name, x in (("starts", starts), ("kept", kept)):
        if x.dtype != torch.int64 or x.device.type != "cpu" or x.dim() != 1:
            raise TypeError(f"similarity: {name} must be int64 and one-dimensional, on the host")
    ranks = starts.diff()
    if len(starts) != k + 1 or not k or int(starts[0]) != 0 or int(starts[-1]) != width or bool((ranks < 0).any()):
        raise ValueError(
            f"similarity: starts must ascend from 0 to {width} in {k + 1} numbers, with at least one update"
        )
    if bool((kept < 0).any()) or bool((kept > ranks).any()):
        raise ValueError("similarity: kept must be between 0 and the columns of an update")
    if not 0 <= split < max(k, 1):
        raise ValueError(f"similarity: split={split}, needed is 0 to {k - 1}")
    inner, shared = dispatch.run("similarity", left, right, starts, kept, split)
    return inner, shared
