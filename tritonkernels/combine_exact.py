"""exact_results: results of factors and in dtypes of any kind, summed in float64. See combine.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_terms import RESULT_COLUMNS, TERM_COLUMNS, TILE_COLUMNS, add_identity, places, rounded
from tritonkernels.values import load_double


@triton.jit
def exact_tile(
    p_result, terms, first_column, first_row, last_row,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, OUT: tl.constexpr, BYTES: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first, count = tl.load(p_result), tl.load(p_result + 1).to(tl.int32)
    address, stride, width = tl.load(p_result + 2), tl.load(p_result + 3), tl.load(p_result + 4)
    o_row = first_row + tl.arange(0, TALL).to(tl.int64)
    o_column = first_column + tl.arange(0, WIDE).to(tl.int64)
    m_row = o_row < last_row
    sums = tl.zeros((TALL, WIDE), tl.float64)
    for i in range(0, count):
        p_term = terms + (first + i) * TERM_COLUMNS
        address_x, stride_x, width_x, code = (
            tl.load(p_term),
            tl.load(p_term + 1),
            tl.load(p_term + 2),
            tl.load(p_term + 3),
        )
        at = tl.load(p_term + 7)
        if tl.load(p_term + 4) == 0:
            scale = tl.load(p_term + 8).to(tl.float64, bitcast=True)
            o_own = o_column - at
            m_own = (o_own >= 0) & (o_own < width_x)
            o_tile = places(stride_x, o_row, o_own, ROWS)
            tile = load_double(address_x, o_tile, m_row[:, None] & m_own[None, :], code, DTYPE, BYTES)
            sums = add_identity(sums, tile * scale, m_own[None, :])
        else:
            stride_long = tl.where(ROWS, 1, stride_x)
            stride_short = tl.where(ROWS, stride_x, 1)
            p_c = tl.load(p_term + 4).to(tl.pointer_type(tl.float64))
            stride_c, width_c = tl.load(p_term + 5), tl.load(p_term + 6)
            scale = tl.load(p_term + 8).to(tl.float64, bitcast=True)
            o_own = o_column - at
            m_own = (o_own >= 0) & (o_own < width_c)
            for k in range(0, width_x.to(tl.int32)):
                offsets = o_row * stride_long + k * stride_short
                x = load_double(address_x, offsets, m_row, code, DTYPE, BYTES)
                o_c = o_own * tl.where(ROWS, stride_c, 1) + k * tl.where(ROWS, 1, stride_c)
                c = tl.load(p_c + o_c, mask=m_own, other=0.0) * scale
                sums = tl.fma(x[:, None].broadcast_to(sums.shape), c[None, :].broadcast_to(sums.shape), sums)
    pointers = address.to(tl.pointer_type(OUT)) + places(stride, o_row, o_column, ROWS)
    tl.store(pointers, rounded(sums, OUT), mask=m_row[:, None] & (o_column < width)[None, :])


@triton.jit
def exact_results(
    tiles,  # int64 [programs, 9]
    results,  # int64 [results, 6]
    terms,  # int64 [terms, 9]
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,  # None: by the terms' codes
    OUT: tl.constexpr,
    BYTES: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    p_tile = tiles + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    p_result = results + tl.load(p_tile) * RESULT_COLUMNS
    first_column, first_row, last_row = tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3)
    exact_tile(
        p_result, terms, first_column, first_row, last_row, ROWS, DTYPE, OUT, BYTES, TALL, WIDE
    )  # fmt: skip
