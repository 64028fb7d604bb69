"""extreme_results: results of tensor cores again, where float32 may not hold their coefficients. See combine.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_exact import exact_tile
from tritonkernels.combine_terms import RESULT_COLUMNS


@triton.jit(do_not_specialize=["count"])
def extreme_results(
    results,  # int64 [count, 6]
    terms,  # int64 [terms, 9]
    flags,  # int64 [terms], what cut_coefficients found
    count,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    BYTES: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    LOOKED: tl.constexpr,  # results of a program
):
    first_result = tl.program_id(0).to(tl.int64) * LOOKED
    o_result = first_result + tl.arange(0, LOOKED)
    p_results, is_result = results + o_result * RESULT_COLUMNS, o_result < count
    first, own_terms = tl.load(p_results, mask=is_result, other=0), tl.load(p_results + 1, mask=is_result, other=0)
    extreme = tl.zeros((LOOKED,), tl.int64)
    for i in range(0, tl.max(own_terms, 0).to(tl.int32)):
        extreme += tl.load(flags + first + i, mask=i < own_terms, other=0)
    if tl.sum(extreme, 0) > 0:
        for i in range(0, LOOKED):
            if tl.sum(tl.where(tl.arange(0, LOOKED) == i, extreme, 0), 0) > 0:
                p_result = results + (first_result + i) * RESULT_COLUMNS
                width, rows = tl.load(p_result + 4), tl.load(p_result + 5)
                for column in range(0, width.to(tl.int32), WIDE):
                    for row in range(0, tl.cdiv(rows, TALL).to(tl.int32)):
                        exact_tile(
                            p_result, terms, column, row * TALL, rows,
                            ROWS, DTYPE, OUT, BYTES, TALL, WIDE,
                        )  # fmt: skip
