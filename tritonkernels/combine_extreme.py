"""extreme_results: results of half_results again, where float32 may not hold their coefficients. See combine.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_exact import exact_tile
from tritonkernels.combine_terms import RESULT_COLUMNS, TERM_COLUMNS, coefficients

SMALLEST, LARGEST = tl.constexpr(1e-20), tl.constexpr(1e20)  # coefficients that float32 sums are trusted with


@triton.jit
def _is_extreme(x):
    return (x != 0) & ((tl.abs(x) >= SMALLEST) & (tl.abs(x) <= LARGEST) == 0)


@triton.jit
def extreme_results(
    chosen,  # int64 [programs]: results of half_results
    results,  # int64 [results, 6]
    terms,  # int64 [terms, 9]
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    BYTES: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    p_result = results + tl.load(chosen + tl.program_id(0).to(tl.int64)) * RESULT_COLUMNS
    first, count = tl.load(p_result), tl.load(p_result + 1).to(tl.int32)
    extreme = 0
    for i in range(0, count):
        p_term = terms + (first + i) * TERM_COLUMNS
        width_x, width_c = tl.load(p_term + 2), tl.load(p_term + 6)
        scale = tl.load(p_term + 8).to(tl.float64, bitcast=True)
        if tl.load(p_term + 4) == 0:
            extreme += _is_extreme(scale).to(tl.int32)
        else:
            for start in range(0, width_x.to(tl.int32), 16):
                for column in range(0, width_c.to(tl.int32), 16):
                    o_row = start + tl.arange(0, 16).to(tl.int64)
                    o_column = column + tl.arange(0, 16).to(tl.int64)
                    address_c, stride_c = tl.load(p_term + 4), tl.load(p_term + 5)
                    c = coefficients(address_c, stride_c, width_c, scale, o_row, o_column, width_x, ROWS)
                    extreme += tl.sum(tl.sum(_is_extreme(c).to(tl.int32), 1), 0)
    if extreme > 0:
        width, rows = tl.load(p_result + 4), tl.load(p_result + 5)
        for column in range(0, width.to(tl.int32), WIDE):
            for row in range(0, tl.cdiv(rows, TALL).to(tl.int32)):
                exact_tile(
                    p_result, terms, column, row * TALL, rows,
                    ROWS, DTYPE, OUT, BYTES, TALL, WIDE,
                )  # fmt: skip
