"""half_summed: a sum of products, a stretch of rows a program, on tensor cores. See combine.py.

out = Σ_i X_i C_i
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_joint import STRETCH_COLUMNS
from tritonkernels.combine_terms import add_stored, load_chunk, near, rounded_half

FACTOR_COLUMNS = tl.constexpr(3)  # of `factors`: address of X_i, its stride in vectors, its width


@triton.jit
def half_summed(
    stretches,  # int64 [programs, 8]: as of half_joint, of the result and its terms; last the address of an int64 or 0
    factors,  # int64 [terms, 3]
    pieces,  # of C_i [terms, 3, SIDE, SIDE]
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that are loaded and stored at once
    TALL: tl.constexpr,  # rows of a stretch
    SIDE: tl.constexpr,  # columns of X_i and of the result, padded: INNER, or twice that
    INNER: tl.constexpr,  # columns of X_i in a product
    AHEAD: tl.constexpr,  # stages of the loop
):
    p_stretch = stretches + tl.program_id(0).to(tl.int64) * STRETCH_COLUMNS
    stretch, last_row = tl.load(p_stretch).to(tl.int32), tl.load(p_stretch + 1).to(tl.int32)
    address, stride = tl.load(p_stretch + 2), tl.load(p_stretch + 3).to(tl.int32) * VECTOR
    width = tl.load(p_stretch + 4).to(tl.int32)
    first, count = tl.load(p_stretch + 5), tl.load(p_stretch + 6).to(tl.int32)
    present = tl.load(p_stretch + 7)
    is_present = tl.load(present.to(tl.pointer_type(tl.int64)), mask=present != 0, other=1) != 0
    count = tl.where(is_present, count, 0)  # where nothing is there to be added, no factor is read
    o_row, o_column = stretch * TALL + tl.arange(0, TALL), tl.arange(0, SIDE)
    m_row = o_row < last_row
    if ROWS:
        m_row = tl.max_constancy(m_row, VECTOR)
    sums = tl.zeros((TALL, SIDE), tl.float32)
    for i in tl.range(0, count, num_stages=AHEAD):
        p_factor = factors + (first + i) * FACTOR_COLUMNS
        address_x, stride_x = tl.load(p_factor), tl.load(p_factor + 1).to(tl.int32) * VECTOR
        width_x = tl.load(p_factor + 2).to(tl.int32)
        p_x = tl.multiple_of(address_x.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)
        p_pieces = pieces + (first + i) * (3 * SIDE * SIDE)
        x = load_chunk(p_x, stride_x, o_row, m_row, width_x, ROWS, VECTOR, INNER, 0)
        sums = add_stored(sums, x, p_pieces, SIDE, 0)
        if SIDE > INNER:
            x = load_chunk(p_x, stride_x, o_row, m_row, width_x, ROWS, VECTOR, INNER, 1)
            sums = add_stored(sums, x, p_pieces, SIDE, 1)
    m_column = o_column < width
    if not ROWS:
        m_column = tl.max_constancy(m_column, VECTOR)
    p_out = tl.multiple_of(address.to(tl.pointer_type(OUT)), VECTOR * OUT.primitive_bitwidth // 8)
    p_out += near(stride, o_row, o_column, ROWS)
    tl.store(p_out, rounded_half(sums, OUT), mask=m_row[:, None] & m_column[None, :])
