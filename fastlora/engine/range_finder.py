"""A randomized range finder on a matrix that is given by its tiles (arXiv 0909.4061)."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fastlora.engine.sweeps import sweep
from fastlora.engine.tall import inner, turned
from fastlora.engine.tile_source import TileSource
from fastlora.errors import NonFiniteError
from fastlora.ops.difference_products import DifferenceProducts, Precision

OVERSAMPLING, POWER_ROUNDS = 10, 2
FIRST_BLOCK = 32
"""The rank that is tried first where none is given; it doubles from there."""
WIDTHS = 16
"""Blocks have multiples of this many columns: as fast as a few less."""
LEAST_SQUARES, MOST_SQUARES = 1e-20, 1e30
"""Where ``‖ΔW‖²`` is not between these, all is computed in float64: nothing that counts is lost in float32 between."""
SMALL_REST = 1e-4
"""Where less of ``‖ΔW‖²`` than this is left, it is measured in float64: float32 knows its root to 1e-5 down to here."""
LEAST = 1e-6
"""Columns that are shorter, relative to the longest, are rounding."""


class RangeFinder:
    """Orthonormal ``P [n, L]`` that grows in blocks, and ``Z = Pᵀ ΔW [L, m]``.

    A block starts with ``Y = ΔW' Ω`` of what the earlier ones leave, ``ΔW' = ΔW − P Z``, and is turned towards the
    largest singular directions by ``q`` power rounds, ``Y = ΔW' qr(ΔW'ᵀ qr(Y))`` (E1). Only the last pass decides what
    ``P`` spans and how exact ``Z`` is. It is done in the precision of the differences; those before it coarsely, in
    bfloat16 where the processor has tiles of it, since a basis for the last pass need not be known better.

    It works with one thread of torch, and reads the matrix with ``threads`` of its own.
    """

    def __init__(self, source: TileSource, key: str, rounds: int, threads: int = 1) -> None:
        self.source = source
        self._threads = threads
        self.total = 0.0
        n, m = source.shape
        self._left = torch.zeros(n, 0, dtype=torch.float64)
        self._right = torch.zeros(m, 0, dtype=torch.float64)
        self._key = key
        self._rounds = rounds
        self._blocks = 0
        self._is_dry = False
        self._is_ordinary = True

    @property
    def captured(self) -> float:
        """``‖Z‖²``."""
        return float(self._right.square().sum())

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to find."""
        return self._is_dry or self._left.shape[1] >= min(self.source.shape)

    def grow(self, rank: int | None = None, *, finely: bool = False) -> None:
        """Adds the next block: for ``rank`` directions, or as many as there are. ``finely``: in float64 in any case."""
        wanted = rank if rank is not None else max(FIRST_BLOCK, self._left.shape[1])
        width = -(-(wanted + OVERSAMPLING) // WIDTHS) * WIDTHS
        width = min(width, min(self.source.shape) - self._left.shape[1])
        basis, lengths = self._power_rounds(self._sample(width))
        precision: Precision = "float32" if self.source.precise == torch.float32 and not finely else "float64"
        left, right = self._block(basis, lengths, precision)
        if rank is not None and self._rest(right) < SMALL_REST * self.total:
            left, right = self._block(*self._orthonormal(right)[:2], "float64")
        self._is_dry = left.shape[1] == 0
        self._left = torch.cat([self._left, left], 1)
        self._right = torch.cat([self._right, right], 1)

    def singular_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U [n, L]``, the singular values, ``Vᵀ [L, m]`` of ``P Z``, largest first."""
        squares, rotation = torch.linalg.eigh(inner(self._right, self._right, self._threads))
        sigma, rotation = squares.flip(0).clamp(min=0.0).sqrt(), rotation.flip(1).contiguous()
        right = turned(self._right, rotation / torch.where(sigma > 0, sigma, 1.0), self._threads)
        return turned(self._left, rotation, self._threads), sigma, right.mT

    def _sample(self, width: int) -> Tensor:
        """``Ω [m, width]``: random numbers that depend on the key and the block alone."""
        digest = hashlib.blake2b(f"{self._key}:{self._blocks}".encode(), digest_size=8).digest()
        self._blocks += 1
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(self.source.shape[1], width, generator=generator)

    def _power_rounds(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """A basis ``[m, width]`` of the strongest inputs, and about how much each is stretched; both coarse."""
        basis, lengths = sample.double(), torch.ones(sample.shape[1], dtype=torch.float64)
        for done in range(self._rounds):
            if done == 0:  # columns of a random product are all along the strongest directions
                images = self._images(basis, lengths, "coarse", back=False, square=self._blocks == 1)[0]
                found = self._preimages(self._orthonormal(images)[0])
            else:
                found = self._images(basis, lengths, "coarse")[1]
            basis, lengths, _ = self._orthonormal(found)
        return basis, lengths

    def _images(
        self, basis: Tensor, lengths: Tensor, precision: Precision, *, back: bool = True, square: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``Y = ΔW' Q [n, width]`` and ``ΔW'ᵀ Y [m, width]``, of one reading. ``square``: ``total`` is measured.

        Columns of ``Q`` are the ``basis`` divided by how much they are stretched. Then those of ``Y`` are about
        orthonormal, and the rounding of the largest does not reach the others.
        """
        given = basis / lengths.clamp(min=LEAST * float(lengths[:1].sum()) or 1.0)
        known = self._left @ (self._right.mT @ given) if self._left.shape[1] else None
        found = self._swept(given, known, precision, back=back, square=square)
        if found.square is not None:
            self.total = found.square
            if self._is_ordinary and not LEAST_SQUARES < self.total < MOST_SQUARES:
                self._is_ordinary = False
                return self._images(basis, lengths, precision, back=back, square=True)
        assert found.images is not None
        return found.images, self._deflated(found)

    def _preimages(self, images: Tensor) -> Tensor:
        """``ΔW'ᵀ · images [m, width]``, coarsely."""
        return self._deflated(self._swept(None, images, "coarse", back=True, square=False)._replace(images=images))

    def _swept(
        self, right: Tensor | None, left: Tensor | None, precision: Precision, *, back: bool, square: bool
    ) -> DifferenceProducts:
        exactly: Precision = precision if self._is_ordinary else "float64"
        return sweep(self.source, right, left, back=back, square=square, precision=exactly, threads=self._threads)

    def _deflated(self, found: DifferenceProducts) -> Tensor:
        """The preimages under ``ΔW'`` from those under ``ΔW``; nothing where there are none."""
        if found.preimages is None:
            return self._right.new_zeros(0, 0)
        if not self._left.shape[1]:
            return found.preimages
        assert found.images is not None
        return found.preimages - self._right @ (self._left.mT @ found.images)

    def _block(self, basis: Tensor, lengths: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
        """New columns of ``P`` and of ``Zᵀ``: ``Y = ΔW' Q``, ``G = ΔW'ᵀ Y``, ``P = Y M``, ``Z = Mᵀ Gᵀ``."""
        images, preimages = self._images(basis, lengths, precision, square=True)
        if not (math.isfinite(self.total) and bool(preimages.isfinite().all())):
            raise NonFiniteError("NaN or Inf in a matrix")
        if self._left.shape[1]:  # rounding has left a little of the earlier blocks
            images = images - self._left @ (self._left.mT @ images)
        columns, _, mixing = self._orthonormal(images)
        return columns, turned(preimages, mixing, self._threads)

    def _rest(self, right: Tensor) -> float:
        return self.total - self.captured - float(right.square().sum())

    def _orthonormal(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``Q [n, k]`` with the range of a float64 ``matrix [n, l]``, its singular values, largest first, and
        ``M [l, k]`` with ``Q = matrix · M``. Columns that are rounding are left out."""
        gram = inner(matrix, matrix, self._threads)
        if not bool(gram.isfinite().all()):
            raise NonFiniteError("NaN or Inf in a matrix")
        squares, vectors = torch.linalg.eigh(gram)
        kept = squares > LEAST**2 * squares[-1:].sum()
        squares, vectors = squares[kept].flip(0), vectors[:, kept].flip(1)
        mixing = vectors / squares.sqrt()
        # The Gram matrix has squared the condition: once more, of columns that are nearly orthonormal.
        nearly = turned(matrix, mixing, self._threads)
        factor = torch.linalg.cholesky(inner(nearly, nearly, self._threads))
        mixing = torch.linalg.solve_triangular(factor, mixing.mT, upper=False).mT
        return turned(matrix, mixing, self._threads), squares.sqrt(), mixing
