"""Products with a matrix that is given by tiles or as a difference of what is stored, in one reading of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastlora.engine.tile_source import TileSource, row_tiles
from fastlora.ops.difference_products import DifferenceProducts, Precision, difference_products
from fastlora.runtime.threads import in_threads, one_thread

COMPUTED_ELEMENTS = 1 << 21
"""Of a tile that is computed: each one costs a call, for which the columns are arranged anew."""
STRETCHES = 8
"""Into how many stretches of rows a computed matrix is cut. Fixed, so that sums have one order for any number of
threads."""


def sweep(
    source: TileSource,
    right: Tensor | None = None,
    left: Tensor | None = None,
    *,
    back: bool = True,
    square: bool = False,
    precision: Precision = "float32",
    threads: int | None = None,
) -> DifferenceProducts:
    """:func:`fastlora.ops.difference_products.difference_products` of a source. What is stored is read once; what is
    computed by tiles is computed once."""
    n, m = source.shape
    threads = threads or torch.get_num_threads()

    def of_piece(rows: slice, old: Tensor | None, new: Tensor, count: int) -> tuple[slice, DifferenceProducts]:
        given = None if left is None else left[rows]
        return rows, difference_products(
            old, new, right, given, back=back, square=square, precision=precision, threads=count
        )

    def images(rows: slice) -> Tensor | None:
        """What they are of rows of zeros."""
        if right is None:
            return None
        return torch.zeros(rows.stop - rows.start, right.shape[1], dtype=torch.float64) if left is None else -left[rows]

    def walk(stretch: slice) -> tuple[slice, DifferenceProducts]:
        try:
            buffer = free.pop()
        except IndexError:
            buffer = torch.empty(height, m, dtype=torch.float64 if precision == "float64" else torch.float32)
        computed = row_tiles(source, buffer.dtype, stretch, buffer)
        found = _summed((of_piece(rows, None, tile, 1) for rows, tile in computed), stretch.start, images(stretch))
        free.append(buffer)
        return stretch, found

    stored = source.stored()
    if stored is None:
        length = max(16, -(-n // STRETCHES // 16) * 16)
        height = min(length, max(16, COMPUTED_ELEMENTS // max(m, 1)))
        free: list[Tensor] = []  # new memory is slow at first
        stretches = [slice(first, min(first + length, n)) for first in range(0, n, length)]
        with one_thread():
            parts: Iterable[tuple[slice, DifferenceProducts]] = in_threads(walk, stretches, threads)
    else:
        pieces: Iterator[tuple[slice, Tensor | None, Tensor]] = iter(stored)
        parts = (of_piece(*piece, threads) for piece in pieces)
    found = _summed(parts, 0, images(slice(0, n)))
    if back and found.preimages is None and (given := left if right is None else right) is not None:
        found = found._replace(preimages=torch.zeros(m, given.shape[1], dtype=torch.float64))
    return found._replace(square=found.square or 0.0) if square else found


def _summed(parts: Iterable[tuple[slice, DifferenceProducts]], first: int, images: Tensor | None) -> DifferenceProducts:
    """The products of rows that begin with ``first``, from those of some; ``images``: of the others."""
    preimages: Tensor | None = None
    square: float | None = None
    for rows, part in parts:
        if images is not None and part.images is not None:
            images[rows.start - first : rows.stop - first] = part.images
        if part.preimages is not None:
            preimages = part.preimages if preimages is None else preimages.add_(part.preimages)
        if part.square is not None:
            square = part.square + (square or 0.0)
    return DifferenceProducts(images, preimages, square)
