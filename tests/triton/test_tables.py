"""The tables that launches are made of: no address, row or place is cut to 32 bits, every row is summed once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fastlora.backends.triton import combine_tables, gram_tables
from fastlora.backends.triton.tables import Matrix, Sections

BF16, FP16, FP32 = 3, 2, 0
FAR = 2**47 - 2**20  # near the end of the address space
TILES = combine_tables.TileShapes(
    ((256, 16), (128, 32)), ((256, 16), (128, 32), (128, 64)), {False: (64, 16), True: (64, 32)}, (128, 16), 3
)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_far_addresses_of_slabs_and_blocks(rows: bool) -> None:
    stride = 2**34
    factors = tuple(Matrix(FAR + 2**20 * i, 5000, 40, stride, BF16) for i in range(2))
    job = gram_tables.AddressedJob(factors, [(0, 1, 2**35), (1, 1, 0)], rows, FAR, 2**33)
    (chunk,) = gram_tables.chunks([job])
    assert chunk.slabs.dtype == chunk.blocks.dtype == np.int64
    step = stride if rows else 1
    for (address, own, width, code), (i, c) in zip(
        chunk.slabs.tolist(), itertools.product(range(2), (0, 16, 32)), strict=False
    ):
        assert (address, own, code) == (FAR + 2**20 * i + 2 * c * step, stride, BF16)
        assert width == min(16, 40 - c)
    wanted = {FAR + 8 * (o + 16 * a * 2**33 + 16 * b) for o in (0, 2**35) for a in range(3) for b in range(3)}
    assert set(chunk.blocks[:, 6].tolist()) == wanted and len(chunk.blocks) == 18


def test_rows_and_places_beyond_32_bits() -> None:
    n = 2**32 + 5
    job = gram_tables.AddressedJob((Matrix(FAR, n, 16, 16, FP32),), [(0, 0, 0)], False, FAR, 16)
    (chunk,) = gram_tables.chunks([job] * 9, workspace=2**40)
    pairs = chunk.sums["slabs"]
    assert int(pairs[:, 3].max()) == n and int((pairs[:, 3] - pairs[:, 2]).sum()) == 9 * n
    places = np.sort(pairs[:, 4])
    assert int(places[-1]) > 2**31 and (np.diff(places) == 256).all() and chunk.size == len(places) * 256
    assert np.array_equal(np.sort(chunk.blocks[:, 0]), np.arange(9) * (len(places) // 9) * 256)


@pytest.mark.parametrize("apart", [9, 1], ids=["all", "chain"])
@pytest.mark.parametrize("ranks", [(16,) * 8, (40, 8, 24), (16,), (64, 64, 64), (3, 100)])
def test_every_wanted_pair_is_formed_once(ranks: tuple[int, ...], apart: int) -> None:
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i, len(ranks)) if not i or j - i <= apart]
    blocks = [(i, j, (i * 8 + j) * 2**14) for i, j in pairs]
    factors = tuple(Matrix(FAR, 9000, r, r, BF16) for r in ranks)
    job = gram_tables.AddressedJob(factors, blocks, False, FAR, 128)
    (chunk,) = gram_tables.chunks([job])
    formed: dict[int, int] = {}
    for kind, tiles in chunk.sums.items():
        for left, right, first, last, place, wanted in tiles.tolist():
            assert first % gram_tables.UNIT == 0 and first < last <= 9000
            assert (kind == "one group") == (left == right) and kind != "slabs"
            for bit in range(16):
                if wanted >> bit & 1:
                    assert left + bit // 4 <= right + bit % 4 < len(chunk.slabs)
                    at = place + bit // 4 * 16 * 64 + bit % 4 * 16
                    assert 0 <= at < chunk.size and at not in formed
                    formed[at] = last - first
    for row in chunk.blocks.tolist():
        assert sum(formed[row[0] + u * row[1]] for u in range(row[2])) == 9000
        assert sum(formed[row[10] + u * row[13]] for u in range(row[2])) == 9000


@pytest.mark.parametrize(
    ("count", "groups"), [(3, [[0, 1, 2]]), (8, [[0, 1, 2, 3], [0, 3, 4, 5], [0, 5, 6, 7]])], ids=["3", "8"]
)
def test_groups_of_a_decomposition_have_what_its_blocks_are_of(count: int, groups: list[list[int]]) -> None:
    """Neighbours and all pairs with the first: no two groups are multiplied for a few pairs of theirs."""
    factors = tuple(Matrix(FAR + 2**20 * i, 2000, 16, 16, BF16) for i in range(count))
    blocks = [(i, j, 0) for i in range(count) for j in range(i, count) if i == 0 or j <= i + 1]
    (chunk,) = gram_tables.chunks([gram_tables.AddressedJob(factors, blocks, False, FAR, 16)] * 2)
    assert list(chunk.sums) == ["one group"]
    found = []
    for left, right in chunk.sums["one group"][:, :2].tolist():
        assert left == right
        slabs = chunk.slabs[left : left + 4].tolist()
        found.append([(address - FAR) // 2**20 for address, _, width, _ in slabs if width])
    assert found == groups * 2


def test_the_arithmetic_of_a_block_is_that_of_its_two_factors() -> None:
    """Tensor cores take what two factors of one half-precision dtype make, whoever else is in the pool."""
    codes = (BF16, BF16, FP32, FP16, FP16)
    factors = tuple(Matrix(FAR + 2**20 * i, 5000, 16, 16, code) for i, code in enumerate(codes))
    places = {(i, j): 256 * (5 * i + j) for i in range(5) for j in range(i, 5)}
    blocks = [(i, j, offset) for (i, j), offset in places.items()]
    jobs = [gram_tables.AddressedJob(factors, blocks, False, FAR + 2**30 * job, 16) for job in range(2)]
    found = {}
    for chunk in gram_tables.chunks(jobs):
        found |= {address: (chunk.kind.half, chunk.kind.code) for address in chunk.blocks[:, 6].tolist()}
    halves = {(0, 0): BF16, (0, 1): BF16, (1, 1): BF16, (3, 3): FP16, (3, 4): FP16, (4, 4): FP16}
    for pair, offset in places.items():
        for job in range(2):
            half, code = found.pop(FAR + 2**30 * job + 8 * offset)
            assert half == (pair in halves) and (not half or code == halves[pair])
    assert not found


def test_chunks_keep_to_the_workspace() -> None:
    job = gram_tables.AddressedJob((Matrix(FAR, 5000, 16, 16, BF16),) * 2, [(0, 1, 0)], False, FAR, 16)
    whole = list(gram_tables.chunks([job] * 10))
    parts = list(gram_tables.chunks([job] * 10, workspace=3 * whole[0].size // 10))
    assert len(whole) == 1 and len(parts) == 4
    assert max(c.size for c in parts) <= 3 * whole[0].size // 10
    assert sum(len(c.blocks) for c in parts) == len(whole[0].blocks)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_tiles_cover_far_results_once(rows: bool) -> None:
    out = Matrix(FAR, 1000, 40, 2**36, BF16)
    factor = Matrix(FAR - 2**21, 1000, 16, 2**35, BF16)
    terms = (combine_tables.TermRow(factor, FAR - 2**30, 2**34, 40, 0, -0.5),)
    results = [
        combine_tables.ResultRow(out, terms, rows),
        combine_tables.ResultRow(out._replace(width=10), terms, rows),
    ]
    batches = list(combine_tables.batches([results], TILES))
    covered = np.zeros((2, 1000, 64), dtype=int)
    for batch in batches:
        assert batch.results[0, 2] == FAR and batch.results[0, 3] == 2**36
        assert batch.terms[0, :7].tolist() == [FAR - 2**21, 2**35, 16, BF16, FAR - 2**30, 2**34, 40]
        assert batch.terms[0, 8:].view(np.float64)[0] == -0.5
        for result, column, first, last, address, stride, *_, count in batch.tiles.tolist():
            assert (address, stride, count) == (FAR, 2**36, 1)
            which = 0 if batch.results[result, 4] == 40 else 1
            covered[which, first:last, column : column + batch.kind.wide] += 1
    assert (covered[0, :, :40] == 1).all() and (covered[1, :, :10] == 1).all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_stretches_cover_results_of_one_matrix_and_sums_once(rows: bool) -> None:
    """Programs of at most three results, coefficients at places of their own, strides counted in vectors."""
    shared, stride = Matrix(FAR, 1000, 16, 2**30, BF16), 2**20
    own = [Matrix(FAR + 2**24 * i, 1000, 16, stride, BF16) for i in range(1, 5)]
    outs = [Matrix(FAR - 2**24 * i, 1000, 16, stride, BF16) for i in range(1, 7)]

    def product(x: Matrix, i: int) -> combine_tables.TermRow:
        return combine_tables.TermRow(x, FAR - 2**40 + 2**12 * i, 16, 16, 0, 2.0)

    unique = [
        combine_tables.ResultRow(out, (combine_tables.TermRow(x, 0, 0, 16, 0, 1.5), product(shared, i)), rows)
        for i, (out, x) in enumerate(zip(outs, own, strict=False))
    ]
    alone = combine_tables.ResultRow(outs[4], (product(shared, 4),), rows)
    mixed = combine_tables.ResultRow(outs[5], tuple(product(x, 5 + i) for i, x in enumerate(own)), rows, FAR + 8)
    joint, summed = combine_tables.batches([[*unique, alone, mixed]] * 2, TILES)
    assert (joint.kind.form, summed.kind.form) == ("joint", "summed")
    made = np.zeros((10, 1000), dtype=int)
    for stretch, last, address, step, width, first, count, _ in joint.tiles.tolist():
        assert (last, address, step, width) == (1000, FAR, 2**27, 16) and count <= 3
        made[first : first + count, 256 * stretch : min(256 * stretch + 256, last)] += 1
    assert (made == 1).all()
    scale = int(np.float32(1.5).view(np.int32))
    wanted = [[x.address, stride // 8, 16, scale, out.address, stride // 8] for x, out in zip(own, outs, strict=False)]
    assert joint.operands.tolist() == [*wanted, [0, 0, 16, 0, outs[4].address, stride // 8]] * 2
    sums = np.zeros((2, 1000), dtype=int)
    for stretch, last, address, step, _, first, count, present in summed.tiles.tolist():
        assert (last, address, step, count, present) == (1000, outs[5].address, stride // 8, 4, FAR + 8)
        sums[first // 4, 256 * stretch : min(256 * stretch + 256, last)] += 1
    assert (sums == 1).all()
    assert summed.operands.tolist() == [[x.address, stride // 8, 16] for x in own] * 2
    for batch, count in ((joint, 10), (summed, 8)):
        assert batch.cuts[:, 7].tolist() == [768 * i for i in range(count)] and batch.pieces == 768 * count
        assert (batch.cuts[:, 5].view(np.float64) == 2.0).all() and not batch.flags.any() and batch.may_be_extreme
        assert np.array_equal(batch.terms[batch.cuts[:, 6], 4], batch.cuts[:, 0])


@pytest.mark.parametrize(("term", "form"), [
    ({}, "joint"), ({"at": 8}, "half"), ({"scale": 1e-30}, "half"), ({"width": 8}, "half"), ({"scale": 0.0}, "joint"),
    ({"factor": Matrix(FAR, 1000, 16, 2**31, BF16)}, "half"), ({"factor": Matrix(FAR, 1000, 16, 16, FP16)}, "exact"),
])  # fmt: skip
def test_which_kernel_makes_a_result(term: dict[str, Any], form: str) -> None:
    """That of one matrix and its own where all are side by side and in reach of 32 bits."""
    x, out = Matrix(FAR, 1000, 16, 16, BF16), Matrix(FAR, 1000, 16, 16, BF16)
    own = combine_tables.TermRow(x, 0, 0, 16, 0, 1.0)._replace(**term)
    result = combine_tables.ResultRow(out, (own, combine_tables.TermRow(x, FAR, 16, 16, 0, 1.0)), False)
    assert combine_tables.kind_of(result, TILES).form == form
    assert combine_tables.kind_of(result._replace(terms=result.terms[::-1]), TILES).form != "joint"


@pytest.mark.parametrize(("matrix", "rows", "vector"), [
    (Matrix(4096, 100, 16, 16, BF16), False, 8), (Matrix(4096, 100, 4, 4, BF16), False, 4),
    (Matrix(4104, 100, 16, 16, BF16), False, 4), (Matrix(4098, 100, 16, 16, BF16), False, 1),
    (Matrix(4096, 100, 16, 17, BF16), False, 1), (Matrix(4096, 100, 17, 24, BF16), False, 1),
    (Matrix(4096, 100, 17, 104, BF16), True, 4), (Matrix(4096, 99, 16, 104, BF16), True, 1),
])  # fmt: skip
def test_vector_loads_need_whole_vectors(matrix: Matrix, rows: bool, vector: int) -> None:
    assert matrix.vector(rows) == vector


def test_sections_begin_at_16_bytes() -> None:
    sections = Sections()
    places = [sections.add(np.arange(n)) for n in (3, 0, 2, 5)]
    buffer = sections.to(torch.device("cpu"))
    assert [p.start % 2 for p in places] == [0] * 4
    assert [buffer[p].tolist() for p in places] == [[0, 1, 2], [], [0, 1], [0, 1, 2, 3, 4]]
