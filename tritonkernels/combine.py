"""combine: results that are linear combinations of a pool's factors, ``out[:, at:at+q] += scale · X C``.

    B side: X = B_i [n, r], C [r, q].   A side (ROWS): X = A_iᵀ, stored as A_i [r, n], C stored as [q, r].

A program makes one tile of one result, [rows, columns] with the long dimension first, and walks the result's terms.
Programs of one stretch of rows follow one another, so a factor that goes into many results comes from memory once and
from the cache thereafter.

* ``half_results``: half-precision results of half-precision factors, on tensor cores with float32 sums. A coefficient
  is scaled, rounded to float32 and cut into three pieces whose products with X are exact: bfloat16 pieces for bfloat16,
  11-bit pieces (what TF32 keeps) for float16. Pieces are added smallest first.
* ``exact_results``: everything else, fused multiply-add in float64.
* ``extreme_results``: after ``half_results``, a program a result; does nothing unless a coefficient is outside
  [1e-20, 1e20], where float32 may overflow or underflow, and then computes the result in float64.

Identity terms are added without a product, and to zero without an addition, so a copy keeps its bits (-0 included).
A result is rounded once, to nearest even: float64 sums by way of a float32 rounded to odd. Bits of a result depend on
its own terms alone.
Floor: every factor read once, every result written once; 2·n·r·q operations a term, three times that on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.launch import INTERPRETED, Launch
from tritonkernels.values import DTYPES, EMULATED, load_double, load_values, single

TILE_COLUMNS = tl.constexpr(9)
"""Of `tiles`: result, first column, first row, last row; address, stride, width, first term and terms of the result, so
that a program need not wait for another table."""
RESULT_COLUMNS = tl.constexpr(6)  # of `results`: first term, terms, address, stride, width, rows
TERM_COLUMNS = tl.constexpr(9)
"""Of `terms`: address, stride, width and dtype code of X; address, stride and width of C (address 0: identity); at;
bits of the scale."""
FLOAT16 = 2  # dtype code
INNER = 16  # columns of X in a product of half_results; sums are made in this order whatever the tile
HALF_TILES = {16: 256, 32: 128, 64: 128}
"""Rows of a tile of half_results, by its columns."""
ROUGH_TILES = {False: (64, 16), True: (64, 32)}
"""Rows and columns of a tile of half_results without vector loads, by whether addresses are odd: without spills."""
EXACT_TILE = (512 if INTERPRETED else 128, 16)  # rows and columns of a tile of exact_results
SMALLEST, LARGEST = tl.constexpr(1e-20), tl.constexpr(1e20)  # coefficients that float32 sums are trusted with


@triton.jit
def _places(stride, o_row, o_column, ROWS: tl.constexpr):
    """Offsets ``[rows, columns]``, the long dimension first."""
    if ROWS:
        offsets = (o_column * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row * stride)[:, None] + o_column[None, :]
    return offsets


@triton.jit
def _coefficients(address, stride, width, scale, o_row, o_column, width_x, ROWS: tl.constexpr):
    """``scale · C`` in float64, ``[rows of C, columns of C]``; zeros outside."""
    if ROWS:
        offsets = (o_column * stride)[None, :] + o_row[:, None]
    else:
        offsets = (o_row * stride)[:, None] + o_column[None, :]
    mask = (o_row < width_x)[:, None] & ((o_column >= 0) & (o_column < width))[None, :]
    return tl.load(address.to(tl.pointer_type(tl.float64)) + offsets, mask=mask, other=0.0) * scale


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
        values = tl.load(pointers + _places(stride, o_row, o_column, ROWS), mask=mask, other=0.0)
    else:
        values = load_values(address, _places(stride, o_row, o_column, ROWS), mask, DTYPE, BYTES)
    return values


@triton.jit
def _leading_bits(x):
    """The 11 leading bits of a float32: what TF32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(sums, x, c, DTYPE: tl.constexpr):
    """``sums + x c`` for float32 ``c``: three products of pieces, each exact."""
    if DTYPE == tl.bfloat16:
        high = c.to(tl.bfloat16)
        rest = c - single(high)
        middle = rest.to(tl.bfloat16)
        low = (rest - single(middle)).to(tl.bfloat16)
        if EMULATED:
            x = single(x)
            high, middle, low = single(high), single(middle), single(low)
        sums = tl.dot(x, low, sums, input_precision="ieee")
        sums = tl.dot(x, middle, sums, input_precision="ieee")
        sums = tl.dot(x, high, sums, input_precision="ieee")
    else:
        # All operands have at most 11 bits, so TF32 products of them are exact.
        high = _leading_bits(c)
        middle = _leading_bits(c - high)
        low = c - high - middle
        x = single(x)
        sums = tl.dot(x, low, sums, input_precision="tf32")
        sums = tl.dot(x, middle, sums, input_precision="tf32")
        sums = tl.dot(x, high, sums, input_precision="tf32")
    return sums


@triton.jit
def _add_identity(sums, part, is_part):
    """``sums + part``, exactly ``part`` where there is no sum yet."""
    return tl.where(is_part, tl.where(sums == 0, part, sums + part), sums)


@triton.jit
def _half(x, OUT: tl.constexpr):
    """float32 rounded to nearest even; the interpreter truncates bfloat16, so there it is done by hand."""
    if EMULATED and OUT == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        result = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(OUT)
    return result


@triton.jit
def _rounded(x, OUT: tl.constexpr):
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
        result = _half(bits.to(tl.float32, bitcast=True), OUT)
    return result


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
    first_row, last_row = tl.multiple_of(tl.load(p_tile + 2), TALL), tl.multiple_of(tl.load(p_tile + 3), VECTOR)
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
            sums = _add_identity(sums, single(part) * scale.to(tl.float32), m_own[None, :])
        else:
            for start in range(0, width_x.to(tl.int32), INNER):
                o_inner = start + tl.arange(0, INNER).to(tl.int64)
                m_inner = o_inner < width_x
                if VECTOR > 1 and not ROWS:
                    m_inner = tl.max_constancy(m_inner, VECTOR)
                x = _load_x(address_x, stride_v, o_row, o_inner, m_row, m_inner, ROWS, DTYPE, BYTES, VECTOR)
                c = _coefficients(address_c, stride_c, width_c, scale, o_inner, o_column - at, width_x, ROWS)
                sums = _add_product(sums, x, c.to(tl.float32), DTYPE)
        address_x, stride_x, width_x, address_c = address_n, stride_n, width_n, c_n
        stride_c, width_c, at, bits = stride_c_n, width_c_n, at_n, bits_n

    m_column = o_column < width
    if VECTOR > 1 and not ROWS:
        m_column = tl.max_constancy(m_column, VECTOR)
    pointers = tl.multiple_of(address.to(tl.pointer_type(OUT)), VECTOR * OUT.primitive_bitwidth // 8)
    pointers += _places(stride, o_row, o_column, ROWS)
    tl.store(pointers, _half(sums, OUT), mask=m_row[:, None] & m_column[None, :])


@triton.jit
def _exact_tile(
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
            o_tile = _places(stride_x, o_row, o_own, ROWS)
            tile = load_double(address_x, o_tile, m_row[:, None] & m_own[None, :], code, DTYPE, BYTES)
            sums = _add_identity(sums, tile * scale, m_own[None, :])
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
    pointers = address.to(tl.pointer_type(OUT)) + _places(stride, o_row, o_column, ROWS)
    tl.store(pointers, _rounded(sums, OUT), mask=m_row[:, None] & (o_column < width)[None, :])


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
    _exact_tile(
        p_result, terms, first_column, first_row, last_row, ROWS, DTYPE, OUT, BYTES, TALL, WIDE
    )  # fmt: skip


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
                    c = _coefficients(address_c, stride_c, width_c, scale, o_row, o_column, width_x, ROWS)
                    extreme += tl.sum(tl.sum(_is_extreme(c).to(tl.int32), 1), 0)
    if extreme > 0:
        width, rows = tl.load(p_result + 4), tl.load(p_result + 5)
        for column in range(0, width.to(tl.int32), WIDE):
            for row in range(0, tl.cdiv(rows, TALL).to(tl.int32)):
                _exact_tile(
                    p_result, terms, column, row * TALL, rows,
                    ROWS, DTYPE, OUT, BYTES, TALL, WIDE,
                )  # fmt: skip


def half_results_launch(
    programs: int, tiles: object, terms: object, *,
    rows: bool, code: int, out: int, odd: bool, vector: int, tall: int, wide: int,
) -> Launch:  # fmt: skip
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "OUT": DTYPES[out], "BYTES": odd, "VECTOR": vector}
    constants |= {"TALL": tall, "WIDE": wide, "INNER": INNER}
    # TF32 pieces take twice the registers of bfloat16 ones: with four warps a tall tile of them spills on sm_80.
    return Launch(half_results, programs, (tiles, terms), constants, 8 if code == FLOAT16 and tall == 256 else 4, 1)


def _exact_constants(rows: bool, code: int | None, out: int, odd: bool) -> dict[str, object]:
    tall, wide = EXACT_TILE
    constants = {"ROWS": rows, "DTYPE": None if code is None else DTYPES[code], "OUT": DTYPES[out], "BYTES": odd}
    return constants | {"TALL": tall, "WIDE": wide}


def exact_results_launch(
    programs: int, tiles: object, results: object, terms: object, *, rows: bool, code: int | None, out: int, odd: bool
) -> Launch:
    """``code`` None: factors of several dtypes."""
    constants = _exact_constants(rows, code, out, odd)
    return Launch(exact_results, programs, (tiles, results, terms), constants, 4, 1)


def extreme_results_launch(
    programs: int, chosen: object, results: object, terms: object, *, rows: bool, code: int, out: int, odd: bool
) -> Launch:
    # For smaller tiles compilers aim at an occupancy that this kernel, which mostly returns at once, has no use for.
    constants = _exact_constants(rows, code, out, odd) | {"TALL": 256}
    return Launch(extreme_results, programs, (chosen, results, terms), constants, 8, 1)
