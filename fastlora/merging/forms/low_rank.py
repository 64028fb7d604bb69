"""The best low-rank approximation of a merged module: of a dense matrix, or of one that only passes by in tiles.

A rule on elements makes a matrix ``M`` of full rank. A range finder needs only products of it with thin matrices: with
``Q`` orthonormal, ``QQᵀM`` is near the best approximation, and its error is known exactly, since
``‖M − QQᵀM‖² = ‖M‖² − ‖QᵀM‖²`` (Halko, Martinsson and Tropp, arXiv 0909.4061).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlora.core.float64 import of_float64
from fastlora.merging.forms.frames import Cut
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import TileOutputs, TileRule, TileTask
from fastlora.reference.philox import words

DENSE_SIDE = 256  # modules with a side up to it are decomposed as dense matrices
OVERSAMPLING = 8
FIRST_WIDTH = 64  # of a sketch that looks for an energy
POWER_STEPS = 1  # each takes two passes
CONVERGED = 0.5  # of the shorter side: a sketch as wide costs more than the dense matrix
SKETCH_KEY = merge_tiles.key_of("sketch")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``left · diag(sigma) · right``: float64 ``[n, q]``, ``[q]`` descending, ``[q, m]``; ``square = ‖M‖²``."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    square: float
    finite: bool

    def cut_to(self, count: int) -> tuple[Tensor, Tensor]:
        """``B = left √Σ`` and ``A = √Σ right`` of the first ``count`` directions, in float64."""
        root = self.sigma[:count].sqrt()
        return self.left[:, :count] * root, root[:, None] * self.right[:count]

    def count(self, cut: Cut) -> int:
        """How many directions a cut keeps; the energy is a share of that of the whole ``M``."""
        sigma = self.sigma.cpu()
        limit = max(float(cut.rtol) * float(sigma[0]), float(cut.floor)) if len(sigma) else 0.0
        count = int((sigma > limit).sum())
        if cut.energy is not None and len(sigma):
            enough = sigma.square().cumsum(0) >= cut.energy * self.square * (1 - 1e-12)
            count = min(count, int(enough.int().argmax()) + 1) if bool(enough.any()) else count
        return count if cut.rank is None else min(count, cut.rank)


def of_dense(M: Tensor) -> LowRank:
    """The singular value decomposition of float64 ``M [n, m]``."""
    finite = bool(M.isfinite().all())
    U, sigma, Vt = torch.linalg.svd(M if finite else torch.zeros_like(M), full_matrices=False)
    return LowRank(U, sigma, Vt, float(sigma.square().sum()), finite)


def of_tiles(task: TileTask, rule: TileRule, cut: Cut) -> LowRank:
    """What ``cut`` keeps of a rule's ``M``, and a few directions more.

    Cost: a small module takes one pass and a dense decomposition. Else four passes with products of width
    ``rank + 8``; for an energy the width is doubled until it is reached.
    """
    n, m = task.shape
    short = min(n, m)
    width = FIRST_WIDTH if cut.rank is None else cut.rank + OVERSAMPLING
    while short > DENSE_SIDE and width <= CONVERGED * short:
        found = _sketched(task, rule, width)
        reached = float(found.sigma.square().sum()) >= (cut.energy or 0.0) * found.square
        if not found.finite or cut.energy is None or reached:
            return found
        width *= 2
    M = torch.empty(n, m, dtype=torch.float64, device=of_float64(task.device))
    merge_tiles.merge(task, rule, TileOutputs(dense=M))
    return of_dense(M)


def _sketched(task: TileTask, rule: TileRule, width: int) -> LowRank:
    thin = _test_matrix(task.shape[1], width).to(of_float64(task.device))
    for step in range(POWER_STEPS + 1):
        told = merge_tiles.merge(task, rule, TileOutputs(right=thin))
        assert told.product is not None
        if not told.finite:
            nothing = told.product[:, :0]
            return LowRank(nothing, nothing[0], thin[:, :0].mT, told.square, False)
        Q = torch.linalg.qr(told.product).Q
        Z = merge_tiles.merge(task, rule, TileOutputs(left=Q)).product
        assert Z is not None
        if step < POWER_STEPS:
            thin = torch.linalg.qr(Z).Q
    V, sigma, Ut = torch.linalg.svd(Z, full_matrices=False)  # Z = MᵀQ = V Σ Uᵀ
    return LowRank(Q @ Ut.mT, sigma, V.mT, told.square, True)


@functools.lru_cache(maxsize=4)
def _test_matrix(length: int, width: int) -> Tensor:
    """Independent uniform numbers in (−1, 1), the same on every machine: float64 ``[length, width]``."""
    drawn = words(np.arange(length * width, dtype=np.int64), SKETCH_KEY, 0).astype(np.float64)
    return torch.from_numpy((drawn + 0.5) / 2.0**31 - 1.0).view(length, width)
