"""Inner products of updates and overlaps of their column spaces, by definition."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def similarity(left: Tensor, right: Tensor, starts: Tensor, kept: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """``⟨U_i R_i, U_j R_j⟩`` and ``‖U_iᵀU_j‖²`` of what is kept, float64 ``[k, k]``: the op
    :mod:`fastlora.ops.similarity`."""
    k, edges = len(kept), starts.tolist()
    spans = [slice(first, last) for first, last in itertools.pairwise(edges)]
    U, R = ([x.double()[:, span] for span in spans] for x in (left, right))
    inner, shared = (torch.zeros(k, k, dtype=torch.float64, device=left.device) for _ in range(2))
    for i in range(k):
        for j in range(i, k):
            if split and not i < split <= j:
                continue
            inner[i, j] = inner[j, i] = ((U[i] @ R[i].mT) * (U[j] @ R[j].mT)).sum()
            cosines = U[i][:, : int(kept[i])].mT @ U[j][:, : int(kept[j])]
            shared[i, j] = shared[j, i] = cosines.square().sum()
    return inner, shared
