"""half_sums: products of slabs of float16 and bfloat16 factors, on tensor cores. See gram.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import EMULATED, SLAB, SLAB_COLUMNS, load_values, single

TILE_COLUMNS = tl.constexpr(6)  # of `tiles`: first left slab, first right slab, first row, last row, place, wanted
WIDTH = tl.constexpr(64)  # columns of a group of slabs: 4
PRODUCT = tl.constexpr(64 * 64)  # elements of a product of two groups


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
