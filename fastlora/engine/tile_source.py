"""Matrices that are computed tile by tile and never as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlora.runtime import memory

TILE_ELEMENTS = 1 << 19
"""With its product a tile stays in the cache. Fixed, so that sums have one order on every machine."""

Piece = tuple[slice, Tensor | None, Tensor]
"""Rows of a matrix, and the stored ``old`` and ``new`` whose difference they are; ``old=None`` for ``new`` itself."""


class Tiled(Protocol):
    """A matrix ``[n, m]`` that gives its tiles."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Writes the tile into ``out``, of any dtype, rounded once; and returns it."""
        ...


class TileSource(Tiled, Protocol):
    """Tiles, or what is stored. ``precise``: the dtype in which they are known: float64, or float32 where what is
    stored is no wider."""

    @property
    def precise(self) -> torch.dtype: ...

    def stored(self) -> Sequence[Piece] | None:
        """All rows that are not 0, from the first to the last, as they are stored; ``None`` where they are computed."""
        ...

    def release(self) -> None:
        """Gives back what was mapped, where memory is bounded."""
        ...


ALL = slice(None)


def row_tiles(
    source: Tiled, dtype: torch.dtype, within: slice = ALL, buffer: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows from the first to the last, of all or ``within`` some. A tile is overwritten by the next one.
    ``buffer``: where they are made, as many rows at once as it has; by default its own."""
    n, m = source.shape
    start, stop, _ = within.indices(n)
    if buffer is None:
        buffer = torch.empty(min(stop - start, tile_length(m)), m, dtype=dtype)
    height = max(1, len(buffer))
    for first in range(start, stop, height):
        rows = slice(first, min(first + height, stop))
        yield rows, source.tile(rows, ALL, buffer[: rows.stop - first])


def column_tiles(source: Tiled, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns from the first to the last. A tile is overwritten by the next one."""
    n, m = source.shape
    width = tile_length(n)
    buffer = torch.empty(n, min(m, width), dtype=dtype)
    for first in range(0, m, width):
        columns = slice(first, min(first + width, m))
        yield columns, source.tile(ALL, columns, buffer[:, : columns.stop - first])


def tile_length(other: int) -> int:
    """Rows of a tile with ``other`` columns, or columns of one with ``other`` rows."""
    return max(16, TILE_ELEMENTS // max(other, 1) // 16 * 16)


@dataclass(frozen=True, slots=True, eq=False)
class DenseMatrix:
    """A matrix that is there: the change of a parameter in memory."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, m)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def precise(self) -> torch.dtype:
        """float64, or float32 for what is no wider."""
        return torch.float64 if self.matrix.dtype == torch.float64 else torch.float32

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`TileSource`."""
        return out.copy_(self.matrix[rows, columns])

    def stored(self) -> Sequence[Piece]:
        """See :class:`TileSource`."""
        return [(slice(0, len(self.matrix)), None, self.matrix)]

    def release(self) -> None:
        """Gives back what is mapped."""
        memory.release([self.matrix])


@dataclass(frozen=True, slots=True, eq=False)
class ZeroMatrix:
    """A matrix of zeros that takes no room."""

    shape: tuple[int, int]
    precise: torch.dtype = torch.float32

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`TileSource`."""
        return out.zero_()

    def stored(self) -> Sequence[Piece]:
        """See :class:`TileSource`."""
        return []

    def release(self) -> None:
        """Nothing is mapped."""


@dataclass(frozen=True, slots=True, eq=False)
class StackedMatrix:
    """Matrices below each other: ``[Σ n_i, m]``."""

    parts: Sequence[TileSource]

    @property
    def shape(self) -> tuple[int, int]:
        """``(Σ n_i, m)``."""
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    @property
    def precise(self) -> torch.dtype:
        """The widest of the parts."""
        return torch.float64 if any(p.precise == torch.float64 for p in self.parts) else torch.float32

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`TileSource`."""
        first, last, _ = rows.indices(self.shape[0])
        start = 0
        for part in self.parts:
            end = start + part.shape[0]
            low, high = max(first, start), min(last, end)
            if low < high:
                part.tile(slice(low - start, high - start), columns, out[low - first : high - first])
            start = end
        return out

    def stored(self) -> Sequence[Piece] | None:
        """See :class:`TileSource`."""
        pieces: list[Piece] = []
        start = 0
        for part in self.parts:
            some = part.stored()
            if some is None:
                return None
            pieces += [(slice(rows.start + start, rows.stop + start), old, new) for rows, old, new in some]
            start += part.shape[0]
        return pieces

    def release(self) -> None:
        """Gives back what is mapped."""
        for part in self.parts:
            part.release()
