"""Which programs a combine pass on a device consists of: tables of results, terms and tiles
(``tritonkernels/combine.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastlora.backends.triton.tables import HALVES, SIZES, IntTable, Matrix, table

LARGEST_SCALE, SMALLEST_SCALE = 1e20, 1e-20  # coefficients that float32 sums are trusted with


class TermRow(NamedTuple):
    """``out[:, at:at+width] += scale · X C``; ``address`` and ``width`` of ``C``, or 0 for the identity."""

    factor: Matrix
    address: int
    stride: int
    width: int
    at: int
    scale: float


class ResultRow(NamedTuple):
    """A result ``out`` of a combine pass as the sum of its ``terms``; ``rows`` for A sides, which are stored ``[r,
    n]``."""

    out: Matrix
    terms: tuple[TermRow, ...]
    rows: bool


class CombineKind(NamedTuple):
    """What results that go into the same launch have in common."""

    rows: bool
    half: bool  # half-precision results of half-precision factors, on tensor cores
    code: int | None  # of the factors; None: several dtypes
    out: int
    odd: bool
    vector: int
    tall: int  # rows of a tile
    wide: int  # columns of a tile


class TileShapes(NamedTuple):
    """``(rows, columns)`` of the tiles that the kernels were made for."""

    half: tuple[tuple[int, int], ...]  # by increasing columns
    rough: dict[bool, tuple[int, int]]  # without vector loads, by whether addresses are odd
    exact: tuple[int, int]


@dataclass(slots=True)
class TileBatch:
    """Results of one kind."""

    kind: CombineKind
    results: IntTable
    terms: IntTable
    tiles: IntTable
    chosen: IntTable
    """Results on tensor cores whose coefficients have to be looked at."""


def kind_of(result: ResultRow, tiles: TileShapes) -> CombineKind:
    """The kind of launch that a result needs, by dtypes and addresses; it tells the shape of its tiles."""
    out, terms, rows = result
    codes = {t.factor.code for t in terms}
    code = codes.pop() if len(codes) == 1 else None if codes else out.code
    half = code in HALVES and out.code in HALVES
    odd = any(t.factor.is_odd() for t in terms)
    if not half:
        return CombineKind(rows, half, code, out.code, odd, 1, *tiles.exact)
    vector = 1 if odd else min([out.vector(rows), *(t.factor.vector(rows) for t in terms)])
    if not rows:
        # The columns of an identity term are loaded from where they are in the result.
        vector = min([vector, *(_power(t.at) for t in terms if not t.address)])
    shape = tiles.rough[odd]
    if vector > 1:
        shape = next((s for s in tiles.half if out.width <= s[1]), tiles.half[-1])
    return CombineKind(rows, half, code, out.code, odd, vector, *shape)


def _power(at: int) -> int:
    return next(v for v in (8, 4, 1) if at % v == 0)


def batches(jobs: Sequence[Sequence[ResultRow]], shapes: TileShapes) -> Iterator[TileBatch]:
    """``jobs``: results that share factors."""
    filling: dict[CombineKind, _FillingBatch] = {}
    for job in jobs:
        touched: dict[CombineKind, list[int]] = {}
        for result in job:
            if not (result.out.n and result.out.width):
                continue
            kind = kind_of(result, shapes)
            if kind not in filling:
                filling[kind] = _FillingBatch(kind)
            touched.setdefault(kind, []).append(filling[kind].add(result))
        for kind, results in touched.items():
            filling[kind].add_tiles(results)
    for filling_batch in filling.values():
        yield filling_batch.batch()


@dataclass(slots=True)
class _FillingBatch:
    """A batch that results are added to."""

    kind: CombineKind
    results: list[tuple[int, ...]] = field(default_factory=list)
    terms: list[tuple[int, ...]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    tiles: list[IntTable] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)

    def add(self, result: ResultRow) -> int:
        out = result.out
        self.results.append((len(self.terms), len(result.terms), out.address, out.stride, out.width, out.n))
        for t in result.terms:
            x = t.factor
            self.terms.append((x.address, x.stride, x.width, x.code, t.address, t.stride, t.width, t.at, 0))
            self.scales.append(t.scale)
        index = len(self.results) - 1
        if any(t.address or not SMALLEST_SCALE <= abs(t.scale) <= LARGEST_SCALE for t in result.terms):
            self.chosen.append(index)
        return index

    def add_tiles(self, results: Sequence[int]) -> None:
        """Tiles of results of one job: those of the same rows follow one another, and find the factors in the cache."""
        n = self.results[results[0]][5]
        columns = [(r, c) for r in results for c in range(0, self.results[r][4], self.kind.wide)]
        first = np.arange(0, n, self.kind.tall, dtype=np.int64)
        tiles = np.empty((len(first), len(columns), 9), dtype=np.int64)
        tiles[:, :, :2] = table(columns, 2)
        tiles[:, :, 2] = first[:, None]
        tiles[:, :, 3] = np.minimum(first + self.kind.tall, n)[:, None]
        result_table = table([self.results[r] for r, _ in columns], 6)
        tiles[:, :, 4:] = result_table[:, [2, 3, 4, 0, 1]]
        self.tiles.append(tiles.reshape(-1, 9))

    def batch(self) -> TileBatch:
        terms = table(self.terms, 9)
        terms[:, 8] = np.array(self.scales, dtype=np.float64).view(np.int64)
        chosen = table([[c] for c in self.chosen] if self.kind.half else [], 1)
        return TileBatch(self.kind, table(self.results, 6), terms, np.concatenate(self.tiles), chosen)


def is_writable(out: Matrix) -> bool:
    """Whether elements of its dtype can lie at the address of ``out``."""
    return out.address % SIZES[out.code] == 0
