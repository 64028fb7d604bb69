"""half_results: half-precision results of half-precision factors, on tensor cores. See combine.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_terms import (
    TERM_COLUMNS,
    TILE_COLUMNS,
    add_identity,
    add_product,
    coefficients,
    pieces_of,
    places,
    rounded_half,
)
from tritonkernels.values import load_values, single


@triton.jit
def _term(p_term, is_there):
    """A row of `terms`, without the dtype code; zeros where there is none."""
    address_x, stride_x = tl.load(p_term, mask=is_there, other=0), tl.load(p_term + 1, mask=is_there, other=0)
    width_x, address_c = tl.load(p_term + 2, mask=is_there, other=0), tl.load(p_term + 4, mask=is_there, other=0)
    stride_c, width_c = tl.load(p_term + 5, mask=is_there, other=0), tl.load(p_term + 6, mask=is_there, other=0)
    at, scale = tl.load(p_term + 7, mask=is_there, other=0), tl.load(p_term + 8, mask=is_there, other=0)
    return address_x, stride_x, width_x, address_c, stride_c, width_c, at, scale


@triton.jit
def _load_x(
    address, stride, o_row, o_column, mask_row, mask_column,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    mask = mask_row[:, None] & mask_column[None, :]
    if VECTOR > 1:
        pointers = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)
        values = tl.load(pointers + places(stride, o_row, o_column, ROWS), mask=mask, other=0.0)
    else:
        values = load_values(address, places(stride, o_row, o_column, ROWS), mask, DTYPE, BYTES)
    return values


@triton.jit
def half_results(
    tiles,  # int64 [programs, 9]
    terms,  # int64 [terms, 9]
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    BYTES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that may be loaded and stored at once
    TALL: tl.constexpr,  # rows of a tile
    WIDE: tl.constexpr,  # columns of a tile
    INNER: tl.constexpr,  # columns of X in a product
):
    p_tile = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    first_column = tl.multiple_of(tl.load(p_tile + 1), WIDE)
    first_row, last_row = tl.multiple_of(tl.load(p_tile + 2), TALL), tl.load(p_tile + 3)
    if ROWS:
        last_row = tl.multiple_of(last_row, VECTOR)
    address, stride, width = tl.load(p_tile + 4), tl.load(p_tile + 5), tl.load(p_tile + 6)
    p_term, count = terms + tl.load(p_tile + 7) * TERM_COLUMNS, tl.load(p_tile + 8).to(tl.int32)
    stride = tl.multiple_of(stride, VECTOR)
    o_row, o_column = first_row + tl.arange(0, TALL), first_column + tl.arange(0, WIDE)
    m_row = o_row < last_row
    if ROWS and VECTOR > 1:
        m_row = tl.max_constancy(m_row, VECTOR)

    sums = tl.zeros((TALL, WIDE), tl.float32)
    # The next term's row is on its way while this term is computed.
    address_x, stride_x, width_x, address_c, stride_c, width_c, at, bits = _term(p_term, count > 0)
    for i in range(0, count):
        p_term += TERM_COLUMNS
        address_n, stride_n, width_n, c_n, stride_c_n, width_c_n, at_n, bits_n = _term(p_term, i + 1 < count)
        # Multiples, as the host has seen to; written so that the compiler sees it too.
        stride_v = stride_x // VECTOR * VECTOR
        at_v = at if ROWS else at // VECTOR * VECTOR
        scale = bits.to(tl.float64, bitcast=True)
        if address_c == 0:
            o_own = o_column - at_v
            m_own = (o_own >= 0) & (o_own < width_x)
            if VECTOR > 1 and not ROWS:
                m_own = tl.max_constancy(m_own, VECTOR)
            part = _load_x(address_x, stride_v, o_row, o_own, m_row, m_own, ROWS, DTYPE, BYTES, VECTOR)
            sums = add_identity(sums, single(part) * scale.to(tl.float32), m_own[None, :])
        else:
            for start in range(0, width_x.to(tl.int32), INNER):
                o_inner = start + tl.arange(0, INNER).to(tl.int64)
                m_inner = o_inner < width_x
                if VECTOR > 1 and not ROWS:
                    m_inner = tl.max_constancy(m_inner, VECTOR)
                x = _load_x(address_x, stride_v, o_row, o_inner, m_row, m_inner, ROWS, DTYPE, BYTES, VECTOR)
                c = coefficients(address_c, stride_c, width_c, scale, o_inner, o_column - at, width_x, ROWS)
                if DTYPE == tl.float16:
                    x = single(x)
                low, middle, high = pieces_of(c.to(tl.float32), DTYPE)
                sums = add_product(sums, x, low, middle, high)
        address_x, stride_x, width_x, address_c = address_n, stride_n, width_n, c_n
        stride_c, width_c, at, bits = stride_c_n, width_c_n, at_n, bits_n

    m_column = o_column < width
    if VECTOR > 1 and not ROWS:
        m_column = tl.max_constancy(m_column, VECTOR)
    pointers = tl.multiple_of(address.to(tl.pointer_type(OUT)), VECTOR * OUT.primitive_bitwidth // 8)
    pointers += places(stride, o_row, o_column, ROWS)
    tl.store(pointers, rounded_half(sums, OUT), mask=m_row[:, None] & m_column[None, :])
