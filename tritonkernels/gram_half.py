"""half_sums: products of slabs of float16 and bfloat16 factors, on tensor cores. See gram.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import EMULATED, SLAB, SLAB_COLUMNS, single

TILE_COLUMNS = tl.constexpr(6)  # of `tiles`: first left slab, first right slab, first row, last row, place, wanted
WIDTH = tl.constexpr(64)  # columns of a group of slabs: 4
EXPONENT = tl.constexpr(0x7F800000)  # the bits of a float32 number that make it a power of two
ROUNDER = tl.constexpr(1.5 * 2.0 ** (23 - 8))
LARGEST_HIGH = tl.constexpr(65408.0)  # of float16: the next multiple would be Inf


@triton.jit
def _slab_tile(slabs, first, ROWS: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Of each of the columns of a tile: where it begins, the distance of its rows, and whether it is there."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    o_column = tl.arange(0, WIDTH)
    column = o_column % SLAB
    p_slab = slabs + (first + o_column // SLAB) * SLAB_COLUMNS
    address, stride, width = tl.load(p_slab), tl.load(p_slab + 1), tl.load(p_slab + 2)
    # The columns of a slab share these, and the host has put aligned slabs alone into a table with VECTOR > 1.
    address = tl.max_constancy(tl.multiple_of(address, VECTOR * SIZE), SLAB)
    stride = tl.max_constancy(tl.multiple_of(stride, VECTOR), SLAB)
    width = tl.max_constancy(width, SLAB)
    is_column = column < width
    if not ROWS:  # a vector lies in a row, and is valid as a whole
        is_column = tl.max_constancy(column < tl.multiple_of(width, VECTOR), VECTOR)
    if VECTOR > 1:
        pointers = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VECTOR * SIZE)
        pointers = tl.max_constancy(pointers, SLAB)
    else:
        pointers = address.to(tl.pointer_type(DTYPE))
    pointers += column * stride if ROWS else column
    return pointers, stride, is_column


@triton.jit
def _load_tile(pointers, stride, is_column, o_row, last, ROWS: tl.constexpr):
    """``[rows, columns]`` of X; zeros beyond the last row and beyond a slab's width."""
    mask = (o_row < last)[:, None] & is_column[None, :]
    offsets = o_row[:, None] if ROWS else o_row[:, None] * stride[None, :]
    return tl.load(pointers[None, :] + offsets, mask=mask, other=0.0)


@triton.jit
def half_sums(
    tiles,  # int64 [programs, 6]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, the products of every tile
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that may be loaded at once
    ONE_GROUP: tl.constexpr,  # the left and the right group are the same
    DEPTH: tl.constexpr,
):
    p_tile = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    left, right = tl.load(p_tile), tl.load(p_tile + 1)
    first, last = tl.load(p_tile + 2), tl.load(p_tile + 3)
    place, wanted = tl.load(p_tile + 4), tl.load(p_tile + 5)
    first = tl.multiple_of(first, DEPTH)
    if ROWS:
        last = tl.multiple_of(last, VECTOR)
    pointers, stride, is_column = _slab_tile(slabs, left, ROWS, DTYPE, VECTOR)
    if not ONE_GROUP:
        pointers_r, stride_r, is_column_r = _slab_tile(slabs, right, ROWS, DTYPE, VECTOR)

    total = tl.zeros((WIDTH, WIDTH), tl.float32)
    rest = tl.zeros((WIDTH, WIDTH), tl.float32)
    steps = tl.cdiv(last - first, DEPTH).to(tl.int32)
    for step in range(0, steps):
        o_row = first + step * DEPTH + tl.arange(0, DEPTH)
        x = _load_tile(pointers, stride, is_column, o_row, last, ROWS)  # [DEPTH, W]
        xh, xl = _split(x)
        if ONE_GROUP:
            y, yh, yl = x, xh, xl
        else:
            y = _load_tile(pointers_r, stride_r, is_column_r, o_row, last, ROWS)
            yh, yl = _split(y)
        total, rest = _add(total, rest, _dot(xh, yh))
        # Sums of their own: as one chain they would take more registers.
        rest += _dot(xl, y)
        rest += _dot(xh, yl)
    # The products of slabs that are wanted: bit ``4 * left + right``.
    o_left, o_right = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    bit = (o_left // SLAB) * (WIDTH // SLAB) + o_right // SLAB
    mask = ((wanted >> bit.to(tl.int64)) & 1) == 1
    tl.store(parts + place + o_left * WIDTH + o_right, total.to(tl.float64) + rest.to(tl.float64), mask=mask)


@triton.jit
def _split(x):
    """``x`` as a sum of two tiles of its dtype, both exact: the multiples of ``u`` that are nearest, and what is left.

    ``u`` is 2⁻⁸ of the power of two at or below the largest element of a column, so a multiple has 9 bits at the most,
    a product of two 18, and the sum of 64 of them 24: float32 holds it, in whatever order it is added.
    """
    wide = single(x)
    peak = tl.max(tl.abs(wide), 0)
    power = (peak.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    rounder = (power * ROUNDER)[None, :]  # a sum with it is a multiple of u, since float32 has no more digits there
    high = (wide + rounder) - rounder
    if x.dtype == tl.float16:
        high = tl.minimum(tl.maximum(high, -LARGEST_HIGH), LARGEST_HIGH)
    low = wide - high
    if not EMULATED:
        high, low = high.to(x.dtype), low.to(x.dtype)
    return high, low


@triton.jit
def _dot(x, y):
    """``xᵀy``, in float32."""
    if EMULATED:
        x, y = single(x), single(y)
    return tl.dot(tl.trans(x), y, input_precision="ieee")


@triton.jit
def _add(total, rest, term):
    """Knuth's sum: ``total + rest + term``, where nothing is rounded but the addition to ``rest``."""
    sum_ = total + term
    back = sum_ - total
    return sum_, rest + ((total - (sum_ - back)) + (term - back))
