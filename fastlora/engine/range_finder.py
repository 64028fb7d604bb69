"""A randomized range finder on a matrix that is given by its tiles (arXiv 0909.4061)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.engine.tile_source import TileSource, row_tiles, squares, tile_length
from fastlora.errors import NonFiniteError
from fastlora.runtime.threads import in_threads

T = TypeVar("T")

OVERSAMPLING, POWER_ROUNDS = 10, 2
FIRST_BLOCK = 32
"""The rank that is tried first where none is given; it doubles from there."""
WIDTHS = 16
"""Blocks have multiples of this many columns: as fast as a few less."""
STRETCHES = 8
"""Into how many stretches of rows a pass is cut. Fixed, so that sums have one order for any number of threads."""
SMALL_REST = 1e-3
"""Where less of ``‖ΔW‖²`` than this is left, it is measured in float64."""
LEAST = 1e-6
"""Columns that are shorter, relative to the longest, are rounding."""


class RangeFinder:
    """Orthonormal ``P [n, L]`` that grows in blocks, and ``Z = Pᵀ ΔW [L, m]``.

    A block starts with ``Y = ΔW' Ω`` of what the earlier ones leave, ``ΔW' = ΔW − P Z``, and is turned towards the
    largest singular directions by ``q`` power rounds, ``Y = ΔW' qr(ΔW'ᵀ qr(Y))`` (E1). Only the last pass decides what
    ``P`` spans and how exact ``Z`` is. It is done in the precision of the differences; those before it in bfloat16
    where the processor multiplies it, since a basis for the last pass need not be known better.

    It works with one thread of torch, and walks over the tiles with ``threads`` of its own.
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
        self._buffers: dict[torch.dtype, list[Tensor]] = {}

    @property
    def captured(self) -> float:
        """``‖Z‖²``."""
        return float(self._right.square().sum())

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to find."""
        return self._is_dry or self._left.shape[1] >= min(self.source.shape)

    def grow(self, rank: int | None = None) -> None:
        """Adds the next block: for ``rank`` directions, or as many as there are."""
        wanted = rank if rank is not None else max(FIRST_BLOCK, self._left.shape[1])
        width = -(-(wanted + OVERSAMPLING) // WIDTHS) * WIDTHS
        width = min(width, min(self.source.shape) - self._left.shape[1])
        basis, lengths = self._power_rounds(self._sample(width))
        left, right = self._block(basis, lengths, self.source.precise)
        if rank is not None and self._rest(right) < SMALL_REST * self.total:
            left, right = self._block(*_orthonormal(right)[:2], torch.float64)
        self._is_dry = left.shape[1] == 0
        self._left = torch.cat([self._left, left], 1)
        self._right = torch.cat([self._right, right], 1)

    def singular_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U [n, L]``, the singular values, ``Vᵀ [L, m]`` of ``P Z``, largest first."""
        squares, rotation = torch.linalg.eigh(self._right.mT @ self._right)
        sigma, rotation = squares.flip(0).clamp(min=0.0).sqrt(), rotation.flip(1).contiguous()
        right = self._right @ rotation / torch.where(sigma > 0, sigma, 1.0)
        return self._left @ rotation, sigma, right.mT

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
                images, _ = self._images(basis, lengths, coarse_dtype(), back=False)
                found = self._preimage(_orthonormal(images)[0])
            else:
                _, found = self._images(basis, lengths, coarse_dtype())
            basis, lengths, _ = _orthonormal(found)
        return basis, lengths

    def _images(
        self, basis: Tensor, lengths: Tensor, dtype: torch.dtype, *, back: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``Y = ΔW' Q [n, width]`` and, of the same tiles, ``ΔW'ᵀ Y [m, width]``; products in ``dtype``.

        Columns of ``Q`` are the ``basis`` divided by how much they are stretched. Then those of ``Y`` are about
        orthonormal, and the rounding of the largest does not reach the others.
        """
        n, m = self.source.shape
        given = basis / lengths.clamp(min=LEAST * float(lengths[:1].sum()) or 1.0)
        inside = self._right.mT @ given
        narrow, left = given.to(dtype), self._left
        images = torch.empty(n, basis.shape[1], dtype=dtype)

        def walk(within: slice) -> tuple[Tensor, float]:
            preimages, total = _Rows(basis.shape[1], m, dtype), 0.0
            for rows, tile in self._tiles(dtype, within):
                image = torch.mm(tile, narrow, out=images[rows])
                if left.shape[1]:
                    image -= (left[rows] @ inside).to(dtype)
                if back:
                    preimages.add(image, tile)
                if dtype != torch.bfloat16:
                    total += squares(tile)
            return preimages.sum, total

        parts, totals = zip(*self._walked(walk), strict=True)
        self.total = sum(totals)
        found, preimages = images.double(), _added(parts)
        return found, preimages - self._right @ (left.mT @ found) if left.shape[1] else preimages

    def _preimage(self, image: Tensor) -> Tensor:
        """``ΔW'ᵀ · image``, coarsely: float64 ``[m, width]``."""
        dtype = coarse_dtype()
        given = image.to(dtype)

        def walk(within: slice) -> Tensor:
            found = _Rows(image.shape[1], self.source.shape[1], dtype)
            for rows, tile in self._tiles(dtype, within):
                found.add(given[rows], tile)
            return found.sum

        return _added(self._walked(walk)) - self._right @ (self._left.mT @ image)

    def _tiles(self, dtype: torch.dtype, within: slice) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of the rows ``within``. Buffers are used again: new memory is slow at first."""
        n, m = self.source.shape
        free = self._buffers.setdefault(dtype, [])
        try:
            buffer = free.pop()
        except IndexError:
            buffer = torch.empty(min(n, tile_length(m, dtype)), m, dtype=dtype)
        yield from row_tiles(self.source, dtype, within, buffer)
        free.append(buffer)

    def _walked(self, walk: Callable[[slice], T]) -> list[T]:
        """What ``walk`` finds in each stretch of rows, on some threads; sums have one order."""
        n = self.source.shape[0]
        length = -(-n // STRETCHES // 16) * 16
        stretches = [slice(first, min(first + length, n)) for first in range(0, n, length)]
        return in_threads(walk, stretches, self._threads)

    def _block(self, basis: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """New columns of ``P`` and of ``Zᵀ``: ``Y = ΔW' Q``, ``G = ΔW'ᵀ Y``, ``P = Y M``, ``Z = Mᵀ Gᵀ``."""
        images, preimages = self._images(basis, lengths, dtype)
        if not (math.isfinite(self.total) and bool(preimages.isfinite().all())):
            raise NonFiniteError("NaN or Inf in a matrix")
        if self._left.shape[1]:  # rounding has left a little of the earlier blocks
            images = images - self._left @ (self._left.mT @ images)
        columns, _, mixing = _orthonormal(images)
        return columns, preimages @ mixing

    def _rest(self, right: Tensor) -> float:
        return self.total - self.captured - float(right.square().sum())


class _Rows:
    """``Σ Yᵀ T [width, m]`` of tiles of rows. Products in bfloat16 are added up in float32."""

    def __init__(self, width: int, m: int, dtype: torch.dtype) -> None:
        is_coarse = dtype == torch.bfloat16
        self.sum = torch.zeros(width, m, dtype=torch.float32 if is_coarse else dtype)
        self._product = torch.empty(width, m, dtype=dtype) if is_coarse else None

    def add(self, image: Tensor, tile: Tensor) -> None:
        """Adds one tile with its image."""
        if self._product is None:
            self.sum.addmm_(image.mT, tile)
        else:
            self.sum += torch.mm(image.mT, tile, out=self._product)


def _added(parts: Sequence[Tensor]) -> Tensor:
    """The sum of ``[width, m]`` as float64 ``[m, width]``."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total.mT.double().contiguous()


def _orthonormal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Q [n, k]`` with the range of a float64 ``matrix [n, l]``, its singular values, largest first, and
    ``M [l, k]`` with ``Q = matrix · M``. Columns that are rounding are left out."""
    gram = matrix.mT @ matrix
    if not bool(gram.isfinite().all()):
        raise NonFiniteError("NaN or Inf in a matrix")
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > LEAST**2 * squares[-1:].sum()
    squares, vectors = squares[kept].flip(0), vectors[:, kept].flip(1)
    mixing = vectors / squares.sqrt()
    # The Gram matrix has squared the condition: once more, of columns that are nearly orthonormal.
    nearly = matrix @ mixing
    factor = torch.linalg.cholesky(nearly.mT @ nearly)
    mixing = torch.linalg.solve_triangular(factor, mixing.mT, upper=False).mT
    return matrix @ mixing, squares.sqrt(), mixing


def coarse_dtype() -> torch.dtype:
    """What power rounds multiply: bfloat16 where the processor does, float32 elsewhere."""
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
