"""What the kernels of combine share: terms of a result as table rows, offsets, coefficients, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import EMULATED

TILE_COLUMNS = tl.constexpr(9)
"""Of `tiles`: result, first column, first row, last row; address, stride, width, first term and terms of the result, so
that a program need not wait for another table."""
RESULT_COLUMNS = tl.constexpr(6)  # of `results`: first term, terms, address, stride, width, rows
TERM_COLUMNS = tl.constexpr(9)
"""Of `terms`: address, stride, width and dtype code of X; address, stride and width of C (address 0: identity); at;
bits of the scale."""


@triton.jit
def places(stride, o_row, o_column, ROWS: tl.constexpr):
    """Offsets ``[rows, columns]``, the long dimension first."""
    if ROWS:
        offsets = (o_column * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row * stride)[:, None] + o_column[None, :]
    return offsets


@triton.jit
def coefficients(address, stride, width, scale, o_row, o_column, width_x, ROWS: tl.constexpr):
    """``scale · C`` in float64, ``[rows of C, columns of C]``; zeros outside."""
    if ROWS:
        offsets = (o_column * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row * stride)[:, None] + o_column[None, :]
    mask = (o_row < width_x)[:, None] & ((o_column >= 0) & (o_column < width))[None, :]
    return tl.load(address.to(tl.pointer_type(tl.float64)) + offsets, mask=mask, other=0.0) * scale


@triton.jit
def add_identity(sums, part, is_part):
    """``sums + part``, exactly ``part`` where there is no sum yet."""
    return tl.where(is_part, tl.where(sums == 0, part, sums + part), sums)


@triton.jit
def rounded_half(x, OUT: tl.constexpr):
    """float32 rounded to nearest even; the interpreter truncates bfloat16, so there it is done by hand."""
    if EMULATED and OUT == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        result = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(OUT)
    return result


@triton.jit
def rounded(x, OUT: tl.constexpr):
    """float64 rounded once: a float32 rounded to odd on the way keeps what nearest even needs to know."""
    if OUT == tl.float64:
        result = x
    elif OUT == tl.float32:
        result = x.to(tl.float32)
    else:
        near = x.to(tl.float32)
        back = near.to(tl.float64)
        bits = near.to(tl.int32, bitcast=True)
        bits = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)
        bits = tl.where(back == x, bits, bits | 1)
        result = rounded_half(bits.to(tl.float32, bitcast=True), OUT)
    return result
