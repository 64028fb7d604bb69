"""What the kernels of combine share: terms of a result as table rows, offsets, coefficients, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import EMULATED, single

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
def near(stride, o_row, o_column, ROWS: tl.constexpr):
    """:func:`places` for numbers of 32 bits, whose products have 64."""
    if ROWS:
        offsets = (o_column.to(tl.int64) * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row.to(tl.int64) * stride)[:, None] + o_column[None, :]
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
def _leading_bits(x):
    """The 11 leading bits of a float32: what TF32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def pieces_of(c, DTYPE: tl.constexpr):
    """A float32 coefficient as a sum of three numbers whose products with ``DTYPE`` are exact: ``low, middle, high``.

    bfloat16 for bfloat16; for float16 what TF32 holds, in float32: all operands have at most 11 bits then.
    """
    if DTYPE == tl.bfloat16:
        high = rounded_half(c, tl.bfloat16)
        rest = c - single(high)
        middle = rounded_half(rest, tl.bfloat16)
        low = rounded_half(rest - single(middle), tl.bfloat16)
    else:
        high = _leading_bits(c)
        middle = _leading_bits(c - high)
        low = c - high - middle
    return low, middle, high


@triton.jit
def add_product(sums, x, low, middle, high):
    """``sums + x c`` for a coefficient in pieces, smallest first; float16 ``x`` comes as float32."""
    PRECISION: tl.constexpr = "tf32" if x.dtype == tl.float32 else "ieee"
    if EMULATED:
        x = single(x)
        low, middle, high = single(low), single(middle), single(high)
    sums = tl.dot(x, low, sums, input_precision=PRECISION)
    sums = tl.dot(x, middle, sums, input_precision=PRECISION)
    return tl.dot(x, high, sums, input_precision=PRECISION)


@triton.jit
def add_stored(sums, x, p_pieces, SIDE: tl.constexpr, CHUNK: tl.constexpr):
    """:func:`add_product` of some columns of a matrix, with pieces ``[3, SIDE, SIDE]`` that were cut before.

    ``CHUNK``: which ``INNER`` columns of it are ``x``.
    """
    INNER: tl.constexpr = x.shape[1]
    o_inner, o_column = tl.arange(0, INNER) + CHUNK * INNER, tl.arange(0, SIDE)
    p_low = p_pieces + (o_inner[:, None] * SIDE + o_column[None, :])
    low, middle, high = tl.load(p_low), tl.load(p_low + SIDE * SIDE), tl.load(p_low + 2 * SIDE * SIDE)
    return add_product(sums, x, low, middle, high)


@triton.jit
def load_chunk(
    pointers, stride, o_row, m_row, width,
    ROWS: tl.constexpr, VECTOR: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``INNER`` columns of a matrix for :func:`add_stored`; zeros beyond its last row and its width."""
    o_inner = tl.arange(0, INNER) + CHUNK * INNER
    m_inner = o_inner < width
    if not ROWS:
        m_inner = tl.max_constancy(m_inner, VECTOR)
    mask = m_row[:, None] & m_inner[None, :]
    x = tl.load(pointers + near(stride, o_row, o_inner, ROWS), mask=mask, other=0.0)
    if x.dtype == tl.float16:
        x = single(x)
    return x


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
