"""cut_coefficients: coefficients in pieces for tensor cores, and which terms float32 does not hold. See combine.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.combine_terms import pieces_of

CUT_COLUMNS = tl.constexpr(10)
"""Of `cuts`: address of C, distance of its rows and of its columns, rows, columns, bits of the scale, place of the
flag, place of the pieces, rows and columns of a piece. Rows and columns are those of [columns of X, columns of the
result]."""
SMALLEST, LARGEST = tl.constexpr(1e-20), tl.constexpr(1e20)  # coefficients that float32 sums are trusted with
CUT = tl.constexpr(16)  # rows and columns that are cut at once


@triton.jit
def cut_coefficients(
    cuts,  # int64 [programs, 10]
    flags,  # int64: set to 1 where a coefficient of the term is out of range, else to 0
    pieces,  # [terms, 3, rows, columns]: low, middle, high
    DTYPE: tl.constexpr,
):
    p_cut = cuts + tl.program_id(0).to(tl.int64) * CUT_COLUMNS
    address, stride_row, stride_column = tl.load(p_cut), tl.load(p_cut + 1), tl.load(p_cut + 2)
    height, width = tl.load(p_cut + 3), tl.load(p_cut + 4)
    scale = tl.load(p_cut + 5).to(tl.float64, bitcast=True)
    flag, place = tl.load(p_cut + 6), tl.load(p_cut + 7)
    rows, columns = tl.load(p_cut + 8), tl.load(p_cut + 9)
    pointers = address.to(tl.pointer_type(tl.float64))
    extreme = 0
    for row in range(0, tl.maximum(height, rows).to(tl.int32), CUT):
        for column in range(0, tl.maximum(width, columns).to(tl.int32), CUT):
            o_row, o_column = row + tl.arange(0, CUT)[:, None], column + tl.arange(0, CUT)[None, :]
            offsets = o_row * stride_row + o_column * stride_column
            c = tl.load(pointers + offsets, mask=(o_row < height) & (o_column < width), other=0.0) * scale
            is_held = (c == 0) | ((tl.abs(c) >= SMALLEST) & (tl.abs(c) <= LARGEST))
            extreme += tl.sum(tl.sum((is_held == 0).to(tl.int32), 1), 0)
            low, middle, high = pieces_of(c.to(tl.float32), DTYPE)
            p_piece = pieces + place + o_row * columns + o_column
            mask = (o_row < rows) & (o_column < columns)
            tl.store(p_piece, low, mask=mask)
            tl.store(p_piece + rows * columns, middle, mask=mask)
            tl.store(p_piece + 2 * rows * columns, high, mask=mask)
    tl.store(flags + flag, (extreme > 0).to(tl.int64))
