"""exact_sums: products of pairs of slabs, fused multiply-add in float64. See gram.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import SLAB, SLAB_COLUMNS, load_double

PAIR_COLUMNS = tl.constexpr(5)  # of `pairs`: left slab, right slab, first row, last row, place


@triton.jit
def pair_sum(
    slabs, left, right, first, last, rows,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The product of two slabs over some rows ``[16, 16]``, in float64; ``ROWS`` None: a side that ``rows`` tells."""
    p_left, p_right = slabs + left * SLAB_COLUMNS, slabs + right * SLAB_COLUMNS
    o_lane = tl.arange(0, LANES)
    sums = tl.zeros((LANES, SLAB, SLAB), tl.float64)
    # Four steps are loaded before the first is used: each goes through shared memory, with a barrier.
    for start in range(0, (last - first).to(tl.int32), 4 * LANES):
        o_row = first + start + o_lane
        x0, y0 = _load_pair(p_left, p_right, o_row, last, rows, ROWS, DTYPE, BYTES)
        x1, y1 = _load_pair(p_left, p_right, o_row + LANES, last, rows, ROWS, DTYPE, BYTES)
        x2, y2 = _load_pair(p_left, p_right, o_row + 2 * LANES, last, rows, ROWS, DTYPE, BYTES)
        x3, y3 = _load_pair(p_left, p_right, o_row + 3 * LANES, last, rows, ROWS, DTYPE, BYTES)
        sums = _add_products(sums, x0, y0)
        sums = _add_products(sums, x1, y1)
        sums = _add_products(sums, x2, y2)
        sums = _add_products(sums, x3, y3)
    return tl.sum(sums, 0)


@triton.jit
def _load_pair(p_left, p_right, o_row, last, rows, ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    """Some rows of two slabs, ``[rows, 16]`` each, in float64."""
    x = _load_slab(p_left, o_row, last, rows, ROWS, DTYPE, BYTES)
    return x, _load_slab(p_right, o_row, last, rows, ROWS, DTYPE, BYTES)


@triton.jit
def _load_slab(p_slab, o_row, last, rows, ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    address, stride, width, code = tl.load(p_slab), tl.load(p_slab + 1), tl.load(p_slab + 2), tl.load(p_slab + 3)
    o_column = tl.arange(0, SLAB)
    if ROWS is None:
        offsets = (o_column * tl.where(rows, stride, 1))[None, :] + (o_row * tl.where(rows, 1, stride))[:, None]
    elif ROWS:
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
    sums = pair_sum(slabs, left, right, first, last, False, ROWS, DTYPE, BYTES, LANES)
    o_slab = tl.arange(0, SLAB)
    tl.store(parts + place + o_slab[:, None] * SLAB + o_slab[None, :], sums)
