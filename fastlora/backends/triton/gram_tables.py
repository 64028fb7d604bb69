"""Which programs a gram pass on a device consists of: tables of slabs, tiles and blocks (``tritonkernels/gram.py``)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastlora.backends.triton.tables import HALVES, SIZES, Matrix, Table, table
from fastlora.ops.passes import BlockPlace

SLAB = 16  # columns of a factor that are handled together
GROUP = 4  # slabs of a side of a product on tensor cores
WIDTH = SLAB * GROUP
PRODUCT = WIDTH * WIDTH
UNIT = 4096  # rows that one program sums; a multiple of its tiles, and the same for every pool
SHORTEST = 1024  # shorter long dimensions are summed in float64, as on the CPU
WORKSPACE = 2**26  # float64 elements of parts that a launch may have
LL, LR, ALL = (True, False, False), (False, True, False), (True, True, True)


class Job(NamedTuple):
    """A :class:`~fastlora.backends.passes.GramJob` in addresses."""

    factors: tuple[Matrix, ...]
    blocks: Sequence[BlockPlace]
    rows: bool
    address: int  # of the first element of ``out`` that belongs to it
    stride: int


class Kind(NamedTuple):
    """What jobs that go into the same launches have in common."""

    rows: bool
    half: bool  # on tensor cores
    code: int | None  # None: several dtypes
    odd: bool
    vector: int


@dataclass(slots=True)
class Chunk:
    """Jobs of one kind whose parts fit into the workspace: their sums, and the blocks that are written from those."""

    kind: Kind
    slabs: Table
    sums: dict[tuple[bool, bool, bool] | None, Table]  # by the products formed; None: pairs of slabs in float64
    blocks: Table
    size: int  # float64 elements of parts


@dataclass(slots=True)
class Pattern:
    """The tables of one job, with places, slabs and addresses counted from its own."""

    slabs: list[tuple[int, int, int]]  # factor, first column, columns
    sums: dict[tuple[bool, bool, bool] | None, Table]
    blocks: Table
    size: int


def kind_of(job: Job) -> Kind:
    used = [job.factors[f] for f in {f for i, j, _ in job.blocks for f in (i, j)}]
    codes = {x.code for x in used}
    code = codes.pop() if len(codes) == 1 else None
    half = code in HALVES and used[0].n >= SHORTEST
    odd = any(x.is_odd() for x in used)
    vector = min(x.vector(job.rows) for x in used) if half and not odd else 1
    return Kind(job.rows, half, code, odd, vector)


def chunks(jobs: Sequence[Job], triple: bool, workspace: int = WORKSPACE) -> Iterator[Chunk]:
    """``triple``: whether one program may form all three products of two groups of slabs."""
    kinds: dict[Kind, list[Job]] = {}
    for job in jobs:
        if any(job.factors[i].width and job.factors[j].width for i, j, _ in job.blocks):
            kinds.setdefault(kind_of(job), []).append(job)
    pattern = functools.lru_cache(maxsize=None)(_pattern)
    lists: dict[int, tuple[BlockPlace, ...]] = {}  # jobs mostly share their list of blocks
    for kind, own in kinds.items():
        filling = _Filling(kind)
        for job in own:
            blocks = lists.setdefault(id(job.blocks), tuple(job.blocks))
            widths = tuple(x.width for x in job.factors)
            # A program with three products takes 250 registers with vector loads, and more than there are without.
            made = pattern(widths, blocks, job.factors[0].n, job.stride, kind.half, triple and kind.vector > 1)
            if filling.size and filling.size + made.size > workspace:
                yield filling.chunk()
                filling = _Filling(kind)
            filling.add(job, made)
        yield filling.chunk()


@dataclass(slots=True)
class _Filling:
    """A chunk that jobs are added to."""

    kind: Kind
    size: int = 0
    slabs: list[Sequence[int]] = field(default_factory=list)
    sums: dict[tuple[bool, bool, bool] | None, list[Table]] = field(default_factory=dict)
    blocks: list[Table] = field(default_factory=list)

    def add(self, job: Job, pattern: Pattern) -> None:
        first_slab = len(self.slabs)
        for f, column, width in pattern.slabs:
            x = job.factors[f]
            step = x.stride if job.rows else 1
            self.slabs.append((x.address + column * step * SIZES[x.code], x.stride, width, x.code))
        for products, rows in pattern.sums.items():
            self.sums.setdefault(products, []).append(
                rows + [first_slab, first_slab, 0, 0, self.size, 0][: rows.shape[1]]
            )
        moved = [self.size, 0, 0, 0, 0, 0, job.address, 0, first_slab, first_slab, self.size, self.size, 0, 0, 0]
        self.blocks.append(pattern.blocks + np.array(moved, dtype=np.int64))
        self.size += pattern.size

    def chunk(self) -> Chunk:
        sums = {products: _longest_first(np.concatenate(rows)) for products, rows in self.sums.items()}
        return Chunk(self.kind, table(self.slabs, 4), sums, np.concatenate(self.blocks), self.size)


def _longest_first(tiles: Table) -> Table:
    """Programs start in the order of the table: the short ones fill the gaps at the end."""
    ordered: Table = tiles[np.argsort(tiles[:, 2] - tiles[:, 3], kind="stable")]
    return ordered


def _units(n: int) -> list[tuple[int, int]]:
    return [(first, min(first + UNIT, n)) for first in range(0, n, UNIT)]


def _pattern(
    widths: tuple[int, ...], blocks: tuple[BlockPlace, ...], n: int, stride: int, half: bool, triple: bool
) -> Pattern:
    used = sorted({f for i, j, _ in blocks for f in (i, j)})
    slabs = [(f, c, min(SLAB, widths[f] - c)) for f in used for c in range(0, widths[f], SLAB)]
    own: dict[int, list[int]] = {f: [] for f in used}
    for s, (f, _, _) in enumerate(slabs):
        own[f].append(s)
    pairs = {(min(s, t), max(s, t)) for i, j, _ in blocks for s in own[i] for t in own[j]}
    if half:
        # What says whether float32 held the squares of a factor's columns.
        pairs |= {(s, s) for s in range(len(slabs))}
        slabs += [(used[0], 0, 0)] * (-len(slabs) % GROUP)
        sums, places, size = _tiles(pairs, n, triple)
    else:
        sums, places, size = _pairs(pairs, n)
    units, pitch = len(_units(n)), WIDTH if half else SLAB
    rows = []
    for i, j, offset in blocks:
        for a, s in enumerate(own[i]):
            for b, t in enumerate(own[j]):
                place, distance = places[min(s, t), max(s, t)]
                pitches = (pitch, 1) if s <= t else (1, pitch)
                address = 8 * (offset + a * SLAB * stride + b * SLAB)
                left, distance_l = places[s, s] if half else (0, 0)
                right, distance_r = places[t, t] if half else (0, 0)
                head = place, distance, units, *pitches, s == t, address, stride
                rows.append((*head, s, t, left, right, n, distance_l, distance_r))
    return Pattern(slabs, sums, table(rows, 15), size)


def _tiles(
    pairs: set[tuple[int, int]], n: int, triple: bool
) -> tuple[dict[tuple[bool, bool, bool] | None, Table], dict[tuple[int, int], tuple[int, int]], int]:
    """Products of groups of slabs: the tiles, and for each pair of slabs the place of its first part and the distance
    of the others."""
    wanted: dict[tuple[int, int], int] = {}
    for s, t in sorted(pairs):
        key = s // GROUP, t // GROUP
        wanted[key] = wanted.get(key, 0) | 1 << (GROUP * (s % GROUP) + t % GROUP)
    rows: dict[tuple[bool, bool, bool] | None, list[tuple[int, ...]]] = {}
    starts: dict[tuple[int, int], tuple[int, int]] = {}
    size = 0

    def add(products: tuple[bool, bool, bool], groups: tuple[int, int], keys: Sequence[tuple[int, int] | None]) -> None:
        """``keys``: which groups the three products are of."""
        nonlocal size
        formed = [k for k, is_formed in zip(keys, products, strict=True) if is_formed]
        mask = sum(wanted.get(k, 0) << (16 * p) for p, k in enumerate(keys) if k is not None and products[p])
        distance = len(formed) * PRODUCT
        # A program puts its second product one product after `place`, whether or not it forms the first.
        place = size - (0 if products[0] else PRODUCT)
        for u, (first, last) in enumerate(_units(n)):
            tile = (groups[0] * GROUP, groups[1] * GROUP, first, last, place + u * distance, mask)
            rows.setdefault(products, []).append(tile)
        for p, key in enumerate(formed):
            if key is not None:
                starts[key] = size + p * PRODUCT, distance
        size += distance * len(_units(n))

    for g, h in sorted(wanted):
        if (g, h) in starts:
            continue
        if triple and g == h and g % 2 == 0 and {(g, g + 1), (g + 1, g + 1)} <= wanted.keys():
            add(ALL, (g, g + 1), ((g, g), (g, g + 1), (g + 1, g + 1)))
        elif g == h:
            add(LL, (g, g), ((g, g), None, None))
        else:
            add(LR, (g, h), (None, (g, h), None))
    places = {}
    for s, t in pairs:
        start, distance = starts[s // GROUP, t // GROUP]
        places[s, t] = start + s % GROUP * SLAB * WIDTH + t % GROUP * SLAB, distance
    return {k: table(v, 6) for k, v in rows.items()}, places, size


def _pairs(
    pairs: set[tuple[int, int]], n: int
) -> tuple[dict[tuple[bool, bool, bool] | None, Table], dict[tuple[int, int], tuple[int, int]], int]:
    """Products of single slabs."""
    rows, places, size = [], {}, 0
    for s, t in sorted(pairs):
        places[s, t] = size, SLAB * SLAB
        for first, last in _units(n):
            rows.append((s, t, first, last, size))
            size += SLAB * SLAB
    return {None: table(rows, 5)}, places, size
