"""gram: blocks G_ij = X_iᵀ X_j of the tall factors of a pool's modules, in float64.

    B side: X_i = B_i [n, r_i].   A side (ROWS): X_i = A_iᵀ, stored as A_i [r_i, n].

Factors are cut into slabs of 16 columns of X. Two ways to sum the products of slabs over a unit of the long dimension:

* ``half_sums``: float16 and bfloat16 on tensor cores. A program takes up to 8 slabs at once, so that each is read
  once, and forms all their products [W, W] from one tile. Products are exact in float32; a stretch of 256 rows is
  summed there, stretches in a float32 pair (a sum and its rounding error). Float64 sums would do the same for 2.5 times
  the issue slots: conversions to float64 run at 16 a clock and multiprocessor.
* ``exact_sums``: fused multiply-add in float64, a program a pair of slabs. float32, float64, mixed and short factors.

``write_blocks`` adds the units of each pair of slabs in order and writes it into the caller's block. ``repair_blocks``
follows ``half_sums``: where squared column norms say that float32 may have overflowed or underflowed, it sums a pair
again in float64; else it only looks.

Units depend on the long dimension alone, and every product of slabs is summed by the same instructions in the same
order wherever it lies, so bits do not depend on the pool. No atomics.
Floor: each factor read once, Σ n·r_i·sizeof bytes; ``half_sums`` does 2·n·W² operations a tile on tensor cores,
``exact_sums`` 2·n·256 a pair of slabs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.launch import INTERPRETED, Launch
from tritonkernels.values import DTYPES, EMULATED, SLAB, load_double, load_values, single

TILE_COLUMNS = tl.constexpr(6)  # of `tiles`: first left slab, first right slab, first row, last row, place, wanted
SLAB_COLUMNS = tl.constexpr(4)  # of `slabs`: address, stride, width, dtype code
PAIR_COLUMNS = tl.constexpr(5)  # of `pairs`: left slab, right slab, first row, last row, place
BLOCK_COLUMNS = tl.constexpr(15)
"""Of `blocks`: place of the first unit's part, distance of units, units, pitch of its rows, pitch of its columns,
whether the lower triangle mirrors the upper, address, stride, left slab, right slab, place of the left and of the right
diagonal, last row, distance of the units of the left and of the right diagonal."""

WIDTH = tl.constexpr(64)  # columns of a group of slabs: 4
PRODUCT = tl.constexpr(64 * 64)  # elements of a product of two groups
DEPTH = 64  # rows of a tile of half_sums
STRETCH = 256  # rows of a float32 sum
LANES = 64 if INTERPRETED else 8  # rows that exact_sums handles side by side; the interpreter counts steps
REPAIRED = 8  # blocks that a program of repair_blocks looks after
SMALLEST, LARGEST = tl.constexpr(1e-20), tl.constexpr(1e30)  # squared column norms that float32 sums are trusted with


@triton.jit
def _slab_tile(slabs, first, WIDTH: tl.constexpr, VECTOR: tl.constexpr, BYTES_OF_VECTOR: tl.constexpr):
    """Address, stride, width and place in its slab of each of the columns of a tile."""
    o_column = tl.arange(0, WIDTH)
    p_slab = slabs + (first + o_column // SLAB) * SLAB_COLUMNS
    address, stride, width = tl.load(p_slab), tl.load(p_slab + 1), tl.load(p_slab + 2)
    # The columns of a slab share these, and the host has put aligned slabs alone into a table with VECTOR > 1.
    address = tl.max_constancy(tl.multiple_of(address, BYTES_OF_VECTOR), SLAB)
    stride = tl.max_constancy(tl.multiple_of(stride, VECTOR), SLAB)
    width = tl.max_constancy(tl.multiple_of(width, VECTOR), SLAB)
    return address, stride, width, o_column % SLAB


@triton.jit
def _load_tile(
    address, stride, width, column, o_row, last,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """``[rows, columns]`` of X; zeros beyond the last row and beyond a slab's width."""
    m_column = tl.max_constancy(column < width, VECTOR)  # a vector is valid as a whole
    mask = (o_row < last)[:, None] & m_column[None, :]
    if ROWS:
        offsets = (column * stride)[None, :] + o_row[:, None]
    else:
        offsets = o_row[:, None] * stride[None, :] + column[None, :]
    if VECTOR > 1:
        pointers = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)
        pointers = tl.max_constancy(pointers, SLAB)
        values = tl.load(pointers[None, :] + offsets, mask=mask, other=0.0)
    else:
        values = load_values(address[None, :], offsets, mask, DTYPE, BYTES)
    return values


@triton.jit
def half_sums(
    tiles,  # int64 [programs, 6]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, the products of every tile
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that may be loaded at once
    LL: tl.constexpr,  # which products of the left and right groups are formed
    LR: tl.constexpr,
    RR: tl.constexpr,
    DEPTH: tl.constexpr,
    STRETCH: tl.constexpr,
):
    p_tile = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    left, right = tl.load(p_tile), tl.load(p_tile + 1)
    first, last = tl.load(p_tile + 2), tl.load(p_tile + 3)
    place, wanted = tl.load(p_tile + 4), tl.load(p_tile + 5)
    first, last = tl.multiple_of(first, DEPTH), tl.multiple_of(last, VECTOR)
    SIZE: tl.constexpr = VECTOR * DTYPE.primitive_bitwidth // 8
    address, stride, width, column = _slab_tile(slabs, left, WIDTH, VECTOR, SIZE)
    if LR:
        address_r, stride_r, width_r, column_r = _slab_tile(slabs, right, WIDTH, VECTOR, SIZE)

    zero = tl.zeros((WIDTH, WIDTH), tl.float32)
    sum_ll, total_ll, error_ll = zero, zero, zero
    sum_lr, total_lr, error_lr = zero, zero, zero
    sum_rr, total_rr, error_rr = zero, zero, zero
    steps = tl.cdiv(last - first, DEPTH).to(tl.int32)
    for step in range(0, steps):
        o_row = first + step * DEPTH + tl.arange(0, DEPTH)
        x = _load_tile(address, stride, width, column, o_row, last, ROWS, DTYPE, BYTES, VECTOR)  # [DEPTH, W]
        if EMULATED:
            x = single(x)
        if LL:
            sum_ll = tl.dot(tl.trans(x), x, sum_ll, input_precision="ieee")
        if LR:
            y = _load_tile(address_r, stride_r, width_r, column_r, o_row, last, ROWS, DTYPE, BYTES, VECTOR)
            if EMULATED:
                y = single(y)
            sum_lr = tl.dot(tl.trans(x), y, sum_lr, input_precision="ieee")
            if RR:
                sum_rr = tl.dot(tl.trans(y), y, sum_rr, input_precision="ieee")
        if (step + 1) % (STRETCH // DEPTH) == 0:
            if LL:
                total_ll, error_ll = _add(total_ll, error_ll, sum_ll)
                sum_ll = zero
            if LR:
                total_lr, error_lr = _add(total_lr, error_lr, sum_lr)
                sum_lr = zero
            if RR:
                total_rr, error_rr = _add(total_rr, error_rr, sum_rr)
                sum_rr = zero
    if LL:
        _store(parts + place, total_ll, error_ll, sum_ll, wanted & 0xFFFF)
    if LR:
        _store(parts + place + PRODUCT, total_lr, error_lr, sum_lr, (wanted >> 16) & 0xFFFF)
    if RR:
        _store(parts + place + 2 * PRODUCT, total_rr, error_rr, sum_rr, (wanted >> 32) & 0xFFFF)


@triton.jit
def _store(pointers, total, error, last_sum, wanted):
    """Writes the products of slabs that are wanted: bit ``4 * left + right``."""
    total, error = _add(total, error, last_sum)
    o_left, o_right = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    bit = (o_left // SLAB) * (WIDTH // SLAB) + o_right // SLAB
    mask = ((wanted >> bit.to(tl.int64)) & 1) == 1
    tl.store(pointers + o_left * WIDTH + o_right, total.to(tl.float64) - error.to(tl.float64), mask=mask)


@triton.jit
def _add(total, error, term):
    """Kahan's sum: ``total - error`` is the sum, to about 48 bits."""
    corrected = term - error
    sum_ = total + corrected
    return sum_, (sum_ - total) - corrected


@triton.jit
def _pair_sum(
    slabs, left, right, first, last,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The product of two slabs over some rows ``[16, 16]``, in float64."""
    p_left, p_right = slabs + left * SLAB_COLUMNS, slabs + right * SLAB_COLUMNS
    o_lane = tl.arange(0, LANES)
    sums = tl.zeros((LANES, SLAB, SLAB), tl.float64)
    # Four steps are loaded before the first is used: each goes through shared memory, with a barrier.
    for start in range(0, (last - first).to(tl.int32), 4 * LANES):
        o_row = first + start + o_lane
        x0, y0 = _load_pair(p_left, p_right, o_row, last, ROWS, DTYPE, BYTES)
        x1, y1 = _load_pair(p_left, p_right, o_row + LANES, last, ROWS, DTYPE, BYTES)
        x2, y2 = _load_pair(p_left, p_right, o_row + 2 * LANES, last, ROWS, DTYPE, BYTES)
        x3, y3 = _load_pair(p_left, p_right, o_row + 3 * LANES, last, ROWS, DTYPE, BYTES)
        sums = _add_products(sums, x0, y0)
        sums = _add_products(sums, x1, y1)
        sums = _add_products(sums, x2, y2)
        sums = _add_products(sums, x3, y3)
    return tl.sum(sums, 0)


@triton.jit
def _load_pair(p_left, p_right, o_row, last, ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    """Some rows of two slabs, ``[rows, 16]`` each, in float64."""
    x = _load_slab(p_left, o_row, last, ROWS, DTYPE, BYTES)
    return x, _load_slab(p_right, o_row, last, ROWS, DTYPE, BYTES)


@triton.jit
def _load_slab(p_slab, o_row, last, ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    address, stride, width, code = tl.load(p_slab), tl.load(p_slab + 1), tl.load(p_slab + 2), tl.load(p_slab + 3)
    o_column = tl.arange(0, SLAB)
    if ROWS:
        offsets = (o_column * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row * stride)[:, None] + o_column[None, :]
    mask = (o_row < last)[:, None] & (o_column < width)[None, :]
    return load_double(address, offsets, mask, code, DTYPE, BYTES)


@triton.jit
def _add_products(sums, x, y):
    return tl.fma(x[:, :, None].broadcast_to(sums.shape), y[:, None, :].broadcast_to(sums.shape), sums)


@triton.jit
def exact_sums(
    pairs,  # int64 [programs, 5]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, the product [16, 16] of every pair
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,  # None: by the slabs' codes
    BYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    p_pair = pairs + tl.program_id(0).to(tl.int64) * PAIR_COLUMNS
    left, right = tl.load(p_pair), tl.load(p_pair + 1)
    first, last, place = tl.load(p_pair + 2), tl.load(p_pair + 3), tl.load(p_pair + 4)
    sums = _pair_sum(slabs, left, right, first, last, ROWS, DTYPE, BYTES, LANES)
    o_slab = tl.arange(0, SLAB)
    tl.store(parts + place + o_slab[:, None] * SLAB + o_slab[None, :], sums)


@triton.jit
def write_blocks(
    blocks,  # int64 [programs, 15]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, what half_sums or exact_sums wrote
):
    p_block = blocks + tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    place, distance, units = tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2).to(tl.int32)
    pitch_row, pitch_column, mirrored = tl.load(p_block + 3), tl.load(p_block + 4), tl.load(p_block + 5)
    o_row, o_column = tl.arange(0, SLAB)[:, None], tl.arange(0, SLAB)[None, :]
    low, high = tl.minimum(o_row, o_column), tl.maximum(o_row, o_column)
    is_upper = mirrored == 0
    o_part = tl.where(is_upper, o_row, low) * pitch_row + tl.where(is_upper, o_column, high) * pitch_column
    total = tl.zeros((SLAB, SLAB), tl.float64)
    for unit in range(0, units):
        total += tl.load(parts + place + unit * distance + o_part)
    _store_block(p_block, slabs, total)


@triton.jit
def _store_block(p_block, slabs, total):
    address, stride = tl.load(p_block + 6), tl.load(p_block + 7)
    height = tl.load(slabs + tl.load(p_block + 8) * SLAB_COLUMNS + 2)
    width = tl.load(slabs + tl.load(p_block + 9) * SLAB_COLUMNS + 2)
    o_row, o_column = tl.arange(0, SLAB)[:, None], tl.arange(0, SLAB)[None, :]
    pointers = address.to(tl.pointer_type(tl.float64)) + o_row * stride + o_column
    tl.store(pointers, total, mask=(o_row < height) & (o_column < width))


@triton.jit
def _out_of_range(p_blocks, is_block, column: tl.constexpr, slabs, parts):
    """How many columns of a slab have a squared norm that float32 sums are not trusted with, for some blocks.

    ``column``: 0 for the left slabs, 1 for the right ones.
    """
    slab = tl.load(p_blocks + 8 + column, mask=is_block, other=0)
    place = tl.load(p_blocks + 10 + column, mask=is_block, other=0)
    distance = tl.load(p_blocks + 13 + column, mask=is_block, other=0)
    units = tl.load(p_blocks + 2, mask=is_block, other=0)
    width = tl.load(slabs + slab * SLAB_COLUMNS + 2, mask=is_block, other=0)
    o_slab = tl.arange(0, SLAB)[None, :]
    is_column = o_slab < width[:, None]
    square = tl.zeros((p_blocks.shape[0], SLAB), tl.float64)
    for unit in range(0, tl.max(units, 0).to(tl.int32)):
        pointers = parts + (place + unit * distance)[:, None] + o_slab * (WIDTH + 1)
        square += tl.load(pointers, mask=is_column & (unit < units)[:, None], other=0.0)
    is_held = (square >= SMALLEST) & (square <= LARGEST)
    return tl.sum((is_column & (is_held == 0)).to(tl.int32), 1)


@triton.jit(do_not_specialize=["count"])
def repair_blocks(
    blocks,  # int64 [count, 15]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, what half_sums wrote
    count,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
    LANES: tl.constexpr,
    REPAIRED: tl.constexpr,  # blocks of a program
):
    first = tl.program_id(0).to(tl.int64) * REPAIRED
    o_block = first + tl.arange(0, REPAIRED)
    p_blocks = blocks + o_block * BLOCK_COLUMNS
    bad = _out_of_range(p_blocks, o_block < count, 0, slabs, parts)
    bad += _out_of_range(p_blocks, o_block < count, 1, slabs, parts)
    if tl.sum(bad, 0) > 0:
        for i in range(0, REPAIRED):
            if tl.sum(tl.where(tl.arange(0, REPAIRED) == i, bad, 0), 0) > 0:
                p_block = blocks + (first + i) * BLOCK_COLUMNS
                left, right, last = tl.load(p_block + 8), tl.load(p_block + 9), tl.load(p_block + 12)
                total = _pair_sum(slabs, left, right, last * 0, last, ROWS, DTYPE, BYTES, LANES)
                _store_block(p_block, slabs, total)


def half_sums_launch(
    programs: int, tiles: object, slabs: object, parts: object, *,
    rows: bool, code: int, odd: bool, vector: int, products: tuple[bool, bool, bool],
) -> Launch:  # fmt: skip
    """``products``: which of left·left, left·right, right·right are formed. Three take all of a multiprocessor."""
    # Without vector loads every element takes an address: fewer of them at a time, so that registers suffice.
    depth, stages = (DEPTH, 5) if vector > 1 else (DEPTH // 4 if odd else DEPTH // 2, 3)
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "BYTES": odd, "VECTOR": vector, "DEPTH": depth}
    constants |= dict(zip(("LL", "LR", "RR"), products, strict=True))
    constants["STRETCH"] = STRETCH
    return Launch(half_sums, programs, (tiles, slabs, parts), constants, 8 if all(products) else 4, stages)


def exact_sums_launch(
    programs: int, pairs: object, slabs: object, parts: object, *, rows: bool, code: int | None, odd: bool
) -> Launch:
    """``code`` None: factors of several dtypes."""
    constants = {"ROWS": rows, "DTYPE": None if code is None else DTYPES[code], "BYTES": odd, "LANES": LANES}
    return Launch(exact_sums, programs, (pairs, slabs, parts), constants, 4, 1)


def write_blocks_launch(programs: int, blocks: object, slabs: object, parts: object) -> Launch:
    return Launch(write_blocks, programs, (blocks, slabs, parts), {}, 1, 1)


def repair_blocks_launch(
    count: int, blocks: object, slabs: object, parts: object, *, rows: bool, code: int, odd: bool
) -> Launch:
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "BYTES": odd, "LANES": LANES, "REPAIRED": REPAIRED}
    return Launch(repair_blocks, -(-count // REPAIRED), (blocks, slabs, parts, count), constants, 8, 1)
