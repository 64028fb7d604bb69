"""Which programs a combine pass on a device consists of: tables of results, terms and tiles
(``tritonkernels/combine.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from fastlora.backends.triton.tables import HALVES, SIZES, IntTable, Matrix, table

LARGEST_SCALE, SMALLEST_SCALE = 1e20, 1e-20  # coefficients that float32 sums are trusted with
LONGEST = 2**31 - 2**12  # rows and strides of matrices that some kernels count in 32 bits


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
    n]``. ``present``: address of an int64, or 0; where it is zero, so are all coefficients."""

    out: Matrix
    terms: tuple[TermRow, ...]
    rows: bool
    present: int = 0


Form = Literal["joint", "summed", "half", "exact"]
"""The kernel that a result needs: of one matrix and its own, a sum of products, others on tensor cores, in float64."""


class CombineKind(NamedTuple):
    """What results that go into the same launch have in common."""

    rows: bool
    form: Form
    code: int | None  # of the factors; None: several dtypes
    out: int
    odd: bool
    vector: int
    tall: int  # rows of a tile, or of a stretch
    wide: int  # columns of a tile; of a matrix and a result, padded


class TileShapes(NamedTuple):
    """``(rows, columns)`` of the tiles that the kernels were made for."""

    stretches: tuple[tuple[int, int], ...]  # of half_joint and half_summed, by increasing columns
    half: tuple[tuple[int, int], ...]  # of half_results, likewise
    rough: dict[bool, tuple[int, int]]  # without vector loads, by whether addresses are odd
    exact: tuple[int, int]
    most_joint: int  # results of a program


@dataclass(slots=True)
class TileBatch:
    """Results of one kind."""

    kind: CombineKind
    results: IntTable
    terms: IntTable
    tiles: IntTable
    """What a program makes: a tile of a result, or a stretch of rows."""
    operands: IntTable
    """What half_joint and half_summed walk through: results, or factors."""
    cuts: IntTable
    """Coefficients of results on tensor cores, with places counted from the batch's first."""
    flags: IntTable
    """Of every term, 1 for a scale that float32 does not hold; those of coefficients come from the device."""
    pieces: int
    """Elements that all pieces of coefficients take."""

    @property
    def may_be_extreme(self) -> bool:
        """Whether a result may have to be made again in float64."""
        return bool(len(self.cuts) or self.flags.any())


def kind_of(result: ResultRow, tiles: TileShapes) -> CombineKind:
    """The kind of launch that a result needs, by dtypes and addresses; it tells the shape of its tiles."""
    out, terms, rows, _ = result
    codes = {t.factor.code for t in terms}
    code = codes.pop() if len(codes) == 1 else None if codes else out.code
    odd = any(t.factor.is_odd() for t in terms)
    if code not in HALVES or out.code not in HALVES:
        return CombineKind(rows, "exact", code, out.code, odd, 1, *tiles.exact)
    vector = 1 if odd else min([out.vector(rows), *(t.factor.vector(rows) for t in terms)])
    if not rows:
        # The columns of an identity term are loaded from where they are in the result.
        vector = min([vector, *(_power(t.at) for t in terms if not t.address)])
    if vector == 1:
        return CombineKind(rows, "half", code, out.code, odd, vector, *tiles.rough[odd])
    form, widest = _form(result), max([out.width, *(t.factor.width for t in terms)])
    shapes = [] if form == "half" else [s for s in tiles.stretches if widest <= s[1]]
    if shapes:
        return CombineKind(rows, form, code, out.code, odd, vector, *shapes[0])
    shape = next((s for s in tiles.half if out.width <= s[1]), tiles.half[-1])
    return CombineKind(rows, "half", code, out.code, odd, vector, *shape)


def _form(result: ResultRow) -> Form:
    """``scale_i X_i + X C_i``, ``Σ X_i C_i``, or anything else."""
    out, terms, _, _ = result
    matrices = [out, *(t.factor for t in terms)]
    if any(max(x.n, x.stride) > LONGEST for x in matrices) or any(t.at for t in terms):
        return "half"
    if not terms or not terms[-1].address:
        return "half"
    before = terms[:-1]
    if before and all(t.address for t in before):
        return "summed"
    is_own = [not t.address and t.width == out.width and not _is_extreme(t.scale) for t in before]
    return "joint" if is_own in ([], [True]) else "half"


def _is_extreme(scale: float) -> bool:
    return scale != 0 and not SMALLEST_SCALE <= abs(scale) <= LARGEST_SCALE


def _power(at: int) -> int:
    return next(v for v in (8, 4, 1) if at % v == 0)


def batches(jobs: Sequence[Sequence[ResultRow]], shapes: TileShapes) -> Iterator[TileBatch]:
    """``jobs``: results that share factors."""
    filling: dict[CombineKind, _FillingBatch] = {}
    for job in jobs:
        touched: dict[tuple[CombineKind, Matrix | None], list[int]] = {}
        for result in job:
            if not (result.out.n and result.out.width):
                continue
            kind = kind_of(result, shapes)
            if kind not in filling:
                filling[kind] = _FillingBatch(kind)
            shared = result.terms[-1].factor if kind.form == "joint" else None
            touched.setdefault((kind, shared), []).append(filling[kind].add(result))
        for (kind, shared), results in touched.items():
            if shared is not None:
                filling[kind].add_joint_stretches(shared, results, shapes.most_joint)
            elif kind.form == "summed":
                filling[kind].add_summed_stretches(results)
            else:
                filling[kind].add_tiles(results)
    for filling_batch in filling.values():
        yield filling_batch.batch()


@dataclass(slots=True)
class _FillingBatch:
    """A batch that results are added to."""

    kind: CombineKind
    added: list[ResultRow] = field(default_factory=list)
    first_terms: list[int] = field(default_factory=list)
    terms: int = 0
    tiles: list[IntTable] = field(default_factory=list)

    def add(self, result: ResultRow) -> int:
        self.added.append(result)
        self.first_terms.append(self.terms)
        self.terms += len(result.terms)
        return len(self.added) - 1

    def add_tiles(self, results: Sequence[int]) -> None:
        """Tiles of results of one job: those of the same rows follow one another, and find the factors in the cache."""
        columns = [(r, c) for r in results for c in range(0, self.added[r].out.width, self.kind.wide)]
        result_table = table([self._result(r) for r, _ in columns], 6)
        n = self.added[results[0]].out.n
        first = np.arange(0, n, self.kind.tall, dtype=np.int64)
        tiles = np.empty((len(first), len(columns), 9), dtype=np.int64)
        tiles[:, :, :2] = table(columns, 2)
        tiles[:, :, 2] = first[:, None]
        tiles[:, :, 3] = np.minimum(first + self.kind.tall, n)[:, None]
        tiles[:, :, 4:] = result_table[:, [2, 3, 4, 0, 1]]
        self.tiles.append(tiles.reshape(-1, 9))

    def add_joint_stretches(self, shared: Matrix, results: Sequence[int], most: int) -> None:
        """Stretches of the results that are made of one matrix: they were added one after another."""
        parts = [results[i : i + most] for i in range(0, len(results), most)]
        self._add_stretches(shared.n, [(*self._placed(shared), part[0], len(part), 0) for part in parts])

    def add_summed_stretches(self, results: Sequence[int]) -> None:
        for r in results:
            out, terms, _, present = self.added[r]
            self._add_stretches(out.n, [(*self._placed(out), self.first_terms[r], len(terms), present)])

    def _add_stretches(self, n: int, parts: Sequence[Sequence[int]]) -> None:
        stretches = -(-n // self.kind.tall)
        rows = np.empty((stretches, len(parts), 8), dtype=np.int64)
        rows[:, :, 0] = np.arange(stretches)[:, None]
        rows[:, :, 1] = n
        rows[:, :, 2:] = table(parts, 6)
        self.tiles.append(rows.reshape(-1, 8))

    def _placed(self, x: Matrix) -> tuple[int, int, int]:
        """Address, stride in vectors, and width."""
        return x.address, x.stride // self.kind.vector, x.width

    def _result(self, index: int) -> tuple[int, ...]:
        out, terms, _, _ = self.added[index]
        return self.first_terms[index], len(terms), out.address, out.stride, out.width, out.n

    def batch(self) -> TileBatch:
        all_terms = [t for result in self.added for t in result.terms]
        scales = np.array([t.scale for t in all_terms], dtype=np.float64)
        terms = table([(*_term(t), 0) for t in all_terms], 9)
        terms[:, 8] = scales.view(np.int64)
        results = table([self._result(r) for r in range(len(self.added))], 6)
        on_tensor_cores = self.kind.form != "exact"
        cuts = table(self._cuts() if on_tensor_cores else [], 10)
        if len(cuts):
            cuts[:, 5] = scales.view(np.int64)[cuts[:, 6]]
        outside = [on_tensor_cores and not t.address and _is_extreme(t.scale) for t in all_terms]
        pieces = int(cuts[:, 8] @ cuts[:, 9]) * 3
        operands = self._operands()
        tiles = np.concatenate(self.tiles)
        return TileBatch(self.kind, results, terms, tiles, operands, cuts, table([outside], 1).reshape(-1), pieces)

    def _cuts(self) -> list[tuple[int, ...]]:
        """The coefficients in order; of `half` results they are only looked at."""
        side = 0 if self.kind.form == "half" else self.kind.wide
        place = 0
        cuts: list[tuple[int, ...]] = []
        for flag, t in enumerate(t for result in self.added for t in result.terms):
            if t.address:
                strides = (1, t.stride) if self.kind.rows else (t.stride, 1)
                cuts.append((t.address, *strides, t.factor.width, t.width, 0, flag, place, side, side))
                place += 3 * side * side
        return cuts

    def _operands(self) -> IntTable:
        if self.kind.form == "joint":
            return table([self._joint_result(result) for result in self.added], 6)
        if self.kind.form == "summed":
            return table([self._placed(t.factor) for result in self.added for t in result.terms], 3)
        return table([], 1)

    def _joint_result(self, result: ResultRow) -> tuple[int, ...]:
        own, out = result.terms[0], self._placed(result.out)
        if own.address:
            return 0, 0, out[2], 0, *out[:2]
        scale = int(np.float32(own.scale).view(np.int32))
        return *self._placed(own.factor)[:2], out[2], scale, *out[:2]


def _term(t: TermRow) -> tuple[int, ...]:
    x = t.factor
    return x.address, x.stride, x.width, x.code, t.address, t.stride, t.width, t.at


def is_writable(out: Matrix) -> bool:
    """Whether elements of its dtype can lie at the address of ``out``."""
    return out.address % SIZES[out.code] == 0
