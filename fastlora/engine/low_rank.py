"""The best approximation ``B A`` of a matrix that is given by its tiles, and what it leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.core.updates import MIN_RTOL
from fastlora.engine.range_finder import FIRST_BLOCK, OVERSAMPLING, POWER_ROUNDS, SMALL_REST, RangeFinder
from fastlora.engine.tile_source import TileSource, column_tiles, row_tiles
from fastlora.errors import NonFiniteError
from fastlora.runtime.threads import one_thread

EXACT_SIDE = 1024
"""Matrices whose shorter side is no longer are decomposed exactly: that takes less than a tenth of a second."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``B A`` with ``B = U √Σ [n, r]`` and ``A = √Σ Vᵀ [r, m]`` in float64; ``sigma``: the ``r`` singular values;
    ``total``: ``‖ΔW‖²``; ``is_exact``: it is the best of its rank, and not nearly so."""

    left: Tensor
    right: Tensor
    sigma: Tensor
    total: float
    is_exact: bool

    @property
    def kept(self) -> float:
        """``Σσ²`` of what is kept."""
        return float(self.sigma.square().sum())

    @property
    def error(self) -> float:
        """``‖ΔW − B A‖ = √(‖ΔW‖² − Σσ²)``, (E2)."""
        return math.sqrt(max(self.total - self.kept, 0.0))

    @property
    def turned(self) -> LowRank:
        """That of the transpose."""
        return LowRank(self.right.mT, self.left.mT, self.sigma, self.total, self.is_exact)


def low_rank(
    source: TileSource,
    rank: int | None,
    energy: float | None,
    *,
    key: str,
    exact: bool = False,
    rounds: int = POWER_ROUNDS,
) -> LowRank:
    """The approximation of at most ``rank``, and of the smallest rank that keeps the share ``energy`` of ``‖ΔW‖²``, of
    those that are given; all that is above rounding where both are ``None``.

    ``exact``: from the Gram matrix of the shorter side; always so where that has at most 1024 rows. Otherwise by a
    randomized range finder (E1), whose random numbers depend on ``key`` alone. Raises :class:`NonFiniteError`.

    Cost, exact: ``2·n·m·min(n, m)`` operations and ``min(n, m)²`` numbers; otherwise ``2q + 2`` products of
    ``2·n·m·(rank + 10)`` operations in ``q + 2`` readings, and ``(n + m)·(rank + 10)`` numbers.
    """
    shorter = min(source.shape)
    needed = shorter if rank is None and energy is None else rank or 0
    try:
        if exact or is_small(shorter, needed):
            return _exact(source, rank, energy)
        threads = torch.get_num_threads()
        with one_thread():
            return _found(RangeFinder(source, key, rounds, threads), rank, energy)
    finally:
        source.release()


def is_small(shorter: int, rank: int) -> bool:
    """Whether a matrix is decomposed exactly for a ``rank``, by the length of its shorter side."""
    return shorter <= EXACT_SIDE or 2 * rank >= shorter


def operations(n: int, m: int, rank: int | None, *, exact: bool) -> int:
    """About how many operations :func:`low_rank` takes for a matrix ``[n, m]``."""
    shorter, needed = min(n, m), FIRST_BLOCK if rank is None else rank
    if exact or is_small(shorter, needed):
        return 2 * n * m * shorter + 10 * shorter**3
    return (4 * POWER_ROUNDS + 4) * n * m * (needed + OVERSAMPLING)


def _found(finder: RangeFinder, rank: int | None, energy: float | None) -> LowRank:
    """By ranges of growing size, until the cut is met."""
    if rank is not None:
        finder.grow(rank)
    else:
        assert energy is not None
        finely = 1 - energy < SMALL_REST
        finder.grow(finely=finely)
        while not finder.is_complete and finder.captured < energy * finder.total:
            finder.grow(finely=finely)
    left, sigma, right = finder.singular_form()
    count = _count(sigma, finder.total, rank, energy)
    return _cut(left[:, :count], sigma[:count], right[:count], finder.total, is_exact=False)


def _exact(source: TileSource, rank: int | None, energy: float | None) -> LowRank:
    """From the Gram matrix of the shorter side, in float64, and one more pass for the other side."""
    n, m = source.shape
    is_wide = n <= m
    gram = torch.zeros(min(n, m), min(n, m), dtype=torch.float64)
    for _, tile in column_tiles(source, torch.float64) if is_wide else row_tiles(source, torch.float64):
        gram.addmm_(tile, tile.mT) if is_wide else gram.addmm_(tile.mT, tile)
    total = float(gram.trace())
    if not math.isfinite(total):
        raise NonFiniteError("NaN or Inf in a matrix")
    with one_thread():
        squares, vectors = torch.linalg.eigh(gram)
    sigma = squares.flip(0).clamp(min=0.0).sqrt()
    count = _count(sigma, total, rank, energy)
    short = vectors.flip(1)[:, :count].contiguous()
    other = torch.empty(max(n, m), count, dtype=torch.float64)
    if is_wide:
        for columns, tile in column_tiles(source, torch.float64):
            other[columns] = tile.mT @ short
    else:
        for rows, tile in row_tiles(source, torch.float64):
            other[rows] = tile @ short
    # Lengths that were measured are better than roots of eigenvalues, which carry the rounding of the largest.
    sigma = torch.linalg.vector_norm(other, dim=0)
    long = other / torch.where(sigma > 0, sigma, 1.0)
    left, right = (short, long.mT) if is_wide else (long, short.mT)
    return _cut(left, sigma, right, total, is_exact=True)


def _count(sigma: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """How many singular values are kept; what is far below the largest is rounding."""
    count = int((sigma > MIN_RTOL * sigma[0]).sum()) if len(sigma) else 0
    if energy is not None:
        below = int((sigma.square().cumsum(0) < energy * total).sum())
        count = min(count, below + 1)
    return count if rank is None else min(count, rank)


def _cut(left: Tensor, sigma: Tensor, right: Tensor, total: float, *, is_exact: bool) -> LowRank:
    root = sigma.sqrt()
    return LowRank(left * root, root[:, None] * right, sigma, total, is_exact)
