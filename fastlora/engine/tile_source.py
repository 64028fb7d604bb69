"""Matrices that are computed tile by tile and never as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlora.runtime import memory

FINE_ELEMENTS, COARSE_ELEMENTS = 1 << 19, 1 << 21
"""Of a tile: with its product it stays in the cache. Fixed, so that sums have one order on every machine."""


LEAST_SQUARES, MOST_SQUARES = 1e-20, 1e30
"""Between these, no square that counts is lost in float32."""


class TileSource(Protocol):
    """A matrix ``[n, m]`` that gives its tiles. ``precise``: the dtype in which differences of what is stored are taken
    without loss that counts: float32 for half precision, else float64."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def precise(self) -> torch.dtype: ...

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Writes the tile into ``out``, of any dtype, rounded once; and returns it."""
        ...

    def release(self) -> None:
        """Gives back what was mapped, where memory is bounded."""
        ...


ALL = slice(None)


def row_tiles(
    source: TileSource, dtype: torch.dtype, within: slice = ALL, buffer: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows from the first to the last, of all or ``within`` some. A tile is overwritten by the next one.

    ``buffer``: where they are made, with :func:`tile_length` rows or those that there are; by default its own.
    """
    n, m = source.shape
    start, stop, _ = within.indices(n)
    height = tile_length(m, dtype)
    if buffer is None:
        buffer = torch.empty(min(stop - start, height), m, dtype=dtype)
    for first in range(start, stop, height):
        rows = slice(first, min(first + height, stop))
        yield rows, source.tile(rows, ALL, buffer[: rows.stop - first])


def column_tiles(source: TileSource, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns from the first to the last. A tile is overwritten by the next one."""
    n, m = source.shape
    width = tile_length(n, dtype)
    buffer = torch.empty(n, min(m, width), dtype=dtype)
    for first in range(0, m, width):
        columns = slice(first, min(first + width, m))
        yield columns, source.tile(ALL, columns, buffer[:, : columns.stop - first])


def tile_length(other: int, dtype: torch.dtype) -> int:
    """Rows of a tile with ``other`` columns, or columns of one with ``other`` rows."""
    elements = COARSE_ELEMENTS if dtype == torch.bfloat16 else FINE_ELEMENTS
    return max(16, elements // max(other, 1) // 16 * 16)


def square_norm(source: TileSource) -> float:
    """``‖·‖²``, in float64."""
    return sum(squares(tile) for _, tile in row_tiles(source, source.precise))


def squares(tile: Tensor) -> float:
    """``‖·‖²`` of a tile, summed in float64; of float32 numbers of usual size, each row is summed in float32: rounding
    of many rows is 1e-8 of the sum."""
    if tile.dtype == torch.float32:
        found = float(torch.linalg.vector_norm(tile, dim=-1).double().square().sum())
        if LEAST_SQUARES < found < MOST_SQUARES:
            return found
    return float(torch.linalg.vector_norm(tile, dim=-1, dtype=torch.float64).square().sum())


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
        """float64, as the change is known in float32."""
        return torch.float64

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`TileSource`."""
        return out.copy_(self.matrix[rows, columns])

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

    def release(self) -> None:
        """Gives back what is mapped."""
        for part in self.parts:
            part.release()
