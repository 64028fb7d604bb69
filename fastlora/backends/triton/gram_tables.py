"""Which programs a gram pass on a device consists of: tables of slabs, tiles and blocks (``tritonkernels/gram.py``)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from fastlora.backends.triton.tables import HALVES, SIZES, IntTable, Matrix, table
from fastlora.ops.passes import BlockPlace

SLAB = 16  # columns of a factor that are handled together
GROUP = 4  # slabs of a side of a product on tensor cores
WIDTH = SLAB * GROUP
PRODUCT = WIDTH * WIDTH
UNIT = 4096  # rows that one program sums; a multiple of its tiles, and the same for every pool
SHORTEST = 1024  # shorter long dimensions are summed in float64, as on the CPU
ONE_GROUP, TWO_GROUPS = 720, 1062  # instructions of a warp for 64 rows, as compiled for sm_90
BLOCK_COLUMNS = 16
WORKSPACE = 2**26  # float64 elements of parts that a launch may have


Sums = Literal["one group", "two groups", "slabs"]
"""What a program makes the products of: a group of slabs with itself, or two groups, on tensor cores; two slabs."""


SlabPair = tuple[int, int]
"""Two slabs of a job, ``s <= t``."""


class AddressedJob(NamedTuple):
    """A :class:`~fastlora.ops.passes.GramJob` in addresses."""

    factors: tuple[Matrix, ...]
    blocks: Sequence[BlockPlace]
    rows: bool
    address: int  # of the first element of ``out`` that belongs to it
    stride: int


class GramKind(NamedTuple):
    """What jobs that go into the same launches have in common."""

    rows: bool
    half: bool  # on tensor cores
    code: int | None  # None: several dtypes
    odd: bool
    vector: int


@dataclass(slots=True)
class JobChunk:
    """Jobs of one kind whose parts fit into the workspace: their sums, and the blocks that are written from those."""

    kind: GramKind
    slabs: IntTable
    sums: dict[Sums, IntTable]
    blocks: IntTable
    size: int  # float64 elements of parts

    @property
    def repaired(self) -> int:
        """The dtype code of blocks that may have to be summed again, or -1."""
        return self.kind.code if self.kind.half and self.kind.code is not None else -1


@dataclass(slots=True)
class JobTables:
    """The tables of one job, with places, slabs and addresses counted from its own."""

    slabs: list[tuple[int, int, int]]  # factor, first column, columns
    sums: dict[Sums, IntTable]
    blocks: IntTable
    size: int


def kind_of(job: AddressedJob) -> GramKind:
    """The kind of launch that a job needs, by the dtypes, addresses and lengths of the factors that its blocks use."""
    used = [job.factors[f] for f in {f for i, j, _ in job.blocks for f in (i, j)}]
    codes = {x.code for x in used}
    code = codes.pop() if len(codes) == 1 else None
    odd = any(x.is_odd() for x in used)
    half = code in HALVES and used[0].n >= SHORTEST and not odd
    vector = min(x.vector(job.rows) for x in used) if half else 1
    return GramKind(job.rows, half, code, odd, vector)


def chunks(jobs: Sequence[AddressedJob], workspace: int = WORKSPACE) -> Iterator[JobChunk]:
    """The jobs by kind, as many at a time as have room for their parts."""
    kinds: dict[GramKind, list[AddressedJob]] = {}
    for job in _of_one_arithmetic(jobs):
        if any(job.factors[i].width and job.factors[j].width for i, j, _ in job.blocks):
            kinds.setdefault(kind_of(job), []).append(job)
    tables_of = functools.lru_cache(maxsize=None)(_job_tables)
    lists: dict[int, tuple[BlockPlace, ...]] = {}  # jobs mostly share their list of blocks
    for kind, jobs_of_kind in kinds.items():
        filling = _FillingChunk(kind)
        for job in jobs_of_kind:
            blocks = lists.setdefault(id(job.blocks), tuple(job.blocks))
            widths = tuple(x.width for x in job.factors)
            made = tables_of(widths, blocks, job.factors[0].n, job.stride, kind.half)
            if filling.size and filling.size + made.size > workspace:
                yield filling.chunk()
                filling = _FillingChunk(kind)
            filling.add(job, made)
        yield filling.chunk()


def rounds(chunks: Iterable[JobChunk], workspace: int = WORKSPACE) -> Iterator[list[JobChunk]]:
    """Chunks of any kind whose parts have room together, by dtype: their blocks are written at once."""
    gathered: list[JobChunk] = []
    for chunk in sorted(chunks, key=lambda c: c.repaired):
        if gathered and sum(c.size for c in gathered) + chunk.size > workspace:
            yield gathered
            gathered = []
        gathered.append(chunk)
    if gathered:
        yield gathered


def joined_blocks(chunks: Sequence[JobChunk]) -> IntTable:
    """The blocks of some chunks, whose slabs and parts follow one another."""
    tables, slabs, parts = [], 0, 0
    for chunk in chunks:
        moved = [parts, 0, 0, 0, 0, 0, 0, 0, slabs, slabs, parts, parts, 0, 0, 0, 0]
        tables.append(chunk.blocks + np.array(moved, dtype=np.int64))
        slabs, parts = slabs + len(chunk.slabs), parts + chunk.size
    return np.concatenate(tables)


def _of_one_arithmetic(jobs: Sequence[AddressedJob]) -> Iterator[AddressedJob]:
    """The jobs, those on factors of several dtypes by the pairs of dtypes of their blocks: how a block is summed
    depends on its two factors, not on what else is in the pool."""
    split: dict[tuple[int, tuple[int, ...]], list[list[BlockPlace]]] = {}  # jobs mostly share their list of blocks
    for job in jobs:
        codes = tuple([x.code for x in job.factors])
        if len(set(codes)) == 1:
            yield job
            continue
        key = id(job.blocks), codes
        if key not in split:
            alike: dict[int | None, list[BlockPlace]] = {}
            for i, j, offset in job.blocks:
                is_half = codes[i] == codes[j] and codes[i] in HALVES
                alike.setdefault(codes[i] if is_half else None, []).append((i, j, offset))
            split[key] = list(alike.values())
        for blocks in split[key]:
            yield job._replace(blocks=blocks)


@dataclass(slots=True)
class _FillingChunk:
    """A chunk that jobs are added to."""

    kind: GramKind
    size: int = 0
    slabs: list[Sequence[int]] = field(default_factory=list)
    sums: dict[Sums, list[IntTable]] = field(default_factory=dict)
    blocks: list[IntTable] = field(default_factory=list)

    def add(self, job: AddressedJob, tables: JobTables) -> None:
        first_slab = len(self.slabs)
        for f, column, width in tables.slabs:
            x = job.factors[f]
            step = x.stride if job.rows else 1
            self.slabs.append((x.address + column * step * SIZES[x.code], x.stride, width, x.code))
        for products, rows in tables.sums.items():
            self.sums.setdefault(products, []).append(
                rows + [first_slab, first_slab, 0, 0, self.size, 0][: rows.shape[1]]
            )
        moved = [self.size, 0, 0, 0, 0, 0, job.address, 0, first_slab, first_slab, self.size, self.size, 0, 0, 0]
        moved.append(int(job.rows))
        self.blocks.append(tables.blocks + np.array(moved, dtype=np.int64))
        self.size += tables.size

    def chunk(self) -> JobChunk:
        sums = {products: _longest_first(np.concatenate(rows)) for products, rows in self.sums.items()}
        return JobChunk(self.kind, table(self.slabs, 4), sums, np.concatenate(self.blocks), self.size)


def _longest_first(tiles: IntTable) -> IntTable:
    """Programs start in the order of the table: the short ones fill the gaps at the end."""
    ordered: IntTable = tiles[np.argsort(tiles[:, 2] - tiles[:, 3], kind="stable")]
    return ordered


def _units(n: int) -> list[tuple[int, int]]:
    return [(first, min(first + UNIT, n)) for first in range(0, n, UNIT)]


def _job_tables(widths: tuple[int, ...], blocks: tuple[BlockPlace, ...], n: int, stride: int, half: bool) -> JobTables:
    used = sorted({f for i, j, _ in blocks for f in (i, j)})
    slabs = [(f, c, min(SLAB, widths[f] - c)) for f in used for c in range(0, widths[f], SLAB)]
    slabs_of: dict[int, list[int]] = {f: [] for f in used}
    for s, (f, _, _) in enumerate(slabs):
        slabs_of[f].append(s)
    pairs = {(min(s, t), max(s, t)) for i, j, _ in blocks for s in slabs_of[i] for t in slabs_of[j]}
    entries = list(range(len(slabs)))  # of slabs in the table
    if half:
        # What says whether float32 held the squares of a factor's columns.
        pairs |= {(s, s) for s in range(len(slabs))}
        sums, part_places, size, order = _tiles(pairs, n)
        entries = [order.index(s) for s in entries]
        slabs = [(used[0], 0, 0) if s is None else slabs[s] for s in order]
    else:
        sums, part_places, size = _pairs(pairs, n)
    units, pitch = len(_units(n)), WIDTH if half else SLAB
    rows = []
    for i, j, offset in blocks:
        for a, s in enumerate(slabs_of[i]):
            for b, t in enumerate(slabs_of[j]):
                part, distance = part_places[min(s, t), max(s, t)]
                pitches = (pitch, 1) if s <= t else (1, pitch)
                address = 8 * (offset + a * SLAB * stride + b * SLAB)
                left, distance_l = part_places[s, s] if half else (0, 0)
                right, distance_r = part_places[t, t] if half else (0, 0)
                head = part, distance, units, *pitches, s == t, address, stride
                rows.append((*head, entries[s], entries[t], left, right, n, distance_l, distance_r, 0))
    return JobTables(slabs, sums, table(rows, BLOCK_COLUMNS), size)


def _tiles(
    pairs: set[SlabPair], n: int
) -> tuple[dict[Sums, IntTable], dict[SlabPair, tuple[int, int]], int, list[int | None]]:
    """Products of groups of slabs: the tiles, for each pair of slabs the place of its first part and the distance of
    the others, and the slabs of all groups one after the other, ``None`` where a group has fewer."""
    rows: dict[Sums, list[tuple[int, ...]]] = {}
    part_places: dict[SlabPair, tuple[int, int]] = {}
    order: list[int | None] = []
    starts: dict[tuple[int, ...], int] = {}
    size = 0
    for left, right, own in _products(pairs):
        for group in (left, right):
            if group not in starts:
                starts[group] = len(order)
                order += [*group, *[None] * (GROUP - len(group))]
        mask = 0
        for s, t in own:
            a, b = left.index(s), right.index(t)
            mask |= 1 << (GROUP * a + b)
            part_places[s, t] = size + a * SLAB * WIDTH + b * SLAB, PRODUCT
        for first, last in _units(n):
            tile = (starts[left], starts[right], first, last, size, mask)
            rows.setdefault("one group" if left == right else "two groups", []).append(tile)
            size += PRODUCT
    return {k: table(v, 6) for k, v in rows.items()}, part_places, size, order


Product = tuple[tuple[int, ...], tuple[int, ...], list[SlabPair]]
"""A group of slabs, another or the same, and the pairs that are formed of them."""


def _products(pairs: set[SlabPair]) -> list[Product]:
    """Products of groups that form every pair ``s <= t`` once, as those that take fewer instructions: of slabs that
    follow one another, or of those that pairs are of, for few pairs of many slabs."""
    last = 1 + max(t for _, t in pairs)
    aligned: dict[SlabPair, list[SlabPair]] = {}
    for s, t in sorted(pairs):
        aligned.setdefault((s - s % GROUP, t - t % GROUP), []).append((s, t))
    made: list[Product] = []
    for (g, h), own in aligned.items():
        left, right = (tuple(range(first, min(first + GROUP, last))) for first in (g, h))
        made.append((left, right, own))
    # A group with itself has ten pairs at the most.
    return min(made, _gathered(pairs), key=_cost) if ONE_GROUP * len(pairs) < 10 * _cost(made) else made


def _gathered(pairs: set[SlabPair]) -> list[Product]:
    """Groups with themselves: as many slabs as have room, pair by pair. Of a chain of slabs and all pairs with the
    first, a group has the first, the last of the group before, and two new ones."""
    missing = dict.fromkeys(sorted(pairs, key=lambda pair: pair[::-1]))
    found: list[Product] = []
    while missing:
        group: set[int] = set()
        for pair in missing:
            if len(group.union(pair)) > GROUP:
                break
            group.update(pair)
        slabs = tuple(sorted(group))
        own = [pair for pair in itertools.combinations_with_replacement(slabs, 2) if pair in missing]
        for pair in own:
            del missing[pair]
        found.append((slabs, slabs, own))
    return found


def _cost(products: list[Product]) -> int:
    """Instructions of a warp for 64 rows."""
    return sum(ONE_GROUP if left == right else TWO_GROUPS for left, right, _ in products)


def _pairs(
    pairs: set[tuple[int, int]], n: int
) -> tuple[dict[Sums, IntTable], dict[tuple[int, int], tuple[int, int]], int]:
    """Products of single slabs."""
    rows, part_places, size = [], {}, 0
    for s, t in sorted(pairs):
        part_places[s, t] = size, SLAB * SLAB
        for first, last in _units(n):
            rows.append((s, t, first, last, size))
            size += SLAB * SLAB
    return {"slabs": table(rows, 5)}, part_places, size
