"""half_joint: every result of a stretch of rows that is made of one matrix, on tensor cores. See combine.py.

out_i = scale_i X_i + X C_i,   X once for all i
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_terms import add_stored, load_chunk, near, rounded_half
from tritonkernels.values import single

STRETCH_COLUMNS = tl.constexpr(8)
"""Of `stretches`: number of the stretch, last row, address, stride and width of X, first result, results, unused.
Strides of this page are in vectors."""
JOINT_COLUMNS = tl.constexpr(6)
"""Of `results`: address of X_i (0: none), its stride, width of the result, float32 bits of the scale, address and
stride of the result."""


@triton.jit
def half_joint(
    stretches,  # int64 [programs, 8]
    results,  # int64 [results, 6]
    pieces,  # of C_i [results, 3, SIDE, SIDE]
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that are loaded and stored at once
    TALL: tl.constexpr,  # rows of a stretch
    SIDE: tl.constexpr,  # columns of X and of a result, padded: INNER, or twice that
    INNER: tl.constexpr,  # columns of X in a product
    AHEAD: tl.constexpr,  # stages of the loop
):
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    p_stretch = stretches + tl.program_id(0).to(tl.int64) * STRETCH_COLUMNS
    stretch, last_row = tl.load(p_stretch).to(tl.int32), tl.load(p_stretch + 1).to(tl.int32)
    address_x, stride_x = tl.load(p_stretch + 2), tl.load(p_stretch + 3).to(tl.int32) * VECTOR
    width_x = tl.load(p_stretch + 4).to(tl.int32)
    first, count = tl.load(p_stretch + 5), tl.load(p_stretch + 6).to(tl.int32)
    o_row, o_column = stretch * TALL + tl.arange(0, TALL), tl.arange(0, SIDE)
    m_row = o_row < last_row
    if ROWS:
        m_row = tl.max_constancy(m_row, VECTOR)
    p_x = tl.multiple_of(address_x.to(tl.pointer_type(DTYPE)), VECTOR * SIZE)
    x = load_chunk(p_x, stride_x, o_row, m_row, width_x, ROWS, VECTOR, INNER, 0)
    if SIDE > INNER:
        x1 = load_chunk(p_x, stride_x, o_row, m_row, width_x, ROWS, VECTOR, INNER, 1)
    for i in tl.range(0, count, num_stages=AHEAD):
        p_result = results + (first + i) * JOINT_COLUMNS
        address_own, stride_own = tl.load(p_result), tl.load(p_result + 1).to(tl.int32) * VECTOR
        width = tl.load(p_result + 2).to(tl.int32)
        scale = tl.load(p_result + 3).to(tl.int32).to(tl.float32, bitcast=True)
        address, stride = tl.load(p_result + 4), tl.load(p_result + 5).to(tl.int32) * VECTOR
        m_column, m_own = o_column < width, o_column < tl.where(address_own == 0, 0, width)
        if not ROWS:
            m_column, m_own = tl.max_constancy(m_column, VECTOR), tl.max_constancy(m_own, VECTOR)
        p_own = tl.multiple_of(address_own.to(tl.pointer_type(DTYPE)), VECTOR * SIZE)
        p_own += near(stride_own, o_row, o_column, ROWS)
        own = tl.load(p_own, mask=m_row[:, None] & m_own[None, :], other=0.0)
        p_pieces = pieces + (first + i) * (3 * SIDE * SIDE)
        sums = add_stored(single(own) * scale, x, p_pieces, SIDE, 0)
        if SIDE > INNER:
            sums = add_stored(sums, x1, p_pieces, SIDE, 1)
        p_out = tl.multiple_of(address.to(tl.pointer_type(OUT)), VECTOR * OUT.primitive_bitwidth // 8)
        p_out += near(stride, o_row, o_column, ROWS)
        tl.store(p_out, rounded_half(sums, OUT), mask=m_row[:, None] & m_column[None, :])
