"""merge_tiles: a rule on the elements of the updates of one module, a tile a program, for a band of rows.

    x_i[a, b] = Σ_p (s_i·B_i[a, p])·A_i[p, b],   each step one fused multiply-add, in the dtype of the factors

Factors are float32 or float64 and contiguous: they are small, and converted before. Elements are formed once for the
votes and again for those that agree, so that a program holds one tile and the sums, whatever the number of adapters.
Products with thin matrices, and histograms, are made of the band in memory by others.

Every element is written by one program and depends on nothing else: bits do not depend on bands or tiles. No atomics.
Floor: ``2·2·r`` operations an element and adapter on the cores for float32 (tensor cores would sum in another order),
about 12 for the rule; a band is written once, 4 bytes an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.launch import INTERPRETED, Launch

ROWS, COLUMNS = (128, 128) if INTERPRETED else (16, 64)  # of a tile; the interpreter counts steps
FACTOR_COLUMNS = tl.constexpr(8)  # of `factors`: B, rank, A, order of low, order of high, bound, key, module
NUMBER_COLUMNS = tl.constexpr(6)  # of `numbers`: scale, low, high, vote, gain, share
NONE, MAGNITUDE, RANDOM, BITS, VARIANCE = (tl.constexpr(i) for i in range(5))  # trimming
ALL, TOTAL, FREQUENCY = (tl.constexpr(i) for i in range(3))  # election


@triton.jit
def _elements(factors, numbers, i, o_row, o_column, n, m, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x_i`` of a tile, zero beyond the module."""
    p_factor = factors + i * FACTOR_COLUMNS
    left = tl.load(p_factor).to(tl.pointer_type(T))
    rank = tl.load(p_factor + 1)
    right = tl.load(p_factor + 2).to(tl.pointer_type(T))
    scale = tl.load(numbers + i * NUMBER_COLUMNS).to(T)
    in_rows, in_columns = o_row < n, o_column < m
    x = tl.zeros((ROWS, COLUMNS), T)
    p_left, p_right = left + o_row * rank, right + o_column
    for _ in range(0, rank.to(tl.int32)):
        b = tl.load(p_left, mask=in_rows, other=0.0) * scale
        a = tl.load(p_right, mask=in_columns, other=0.0)
        p_left += 1
        p_right += m
        x = tl.fma(b[:, None].broadcast_to(x.shape), a[None, :].broadcast_to(x.shape), x)
    return x


@triton.jit
def _quotient(a, b, T: tl.constexpr):
    """Rounded to nearest, which ``/`` is in float64 alone."""
    if T == tl.float32:
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def _held(size, magnitude, order, number):
    return (size > magnitude) | ((size == magnitude) & (number < order))


@triton.jit
def _word(number, key, module):
    """The Philox word of an element: one of the four of its block."""
    block, which = number >> 2, (number & 3).to(tl.int32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    third = tl.zeros_like(low) + (module & 0xFFFFFFFF).to(tl.uint32)
    fourth = tl.zeros_like(low) + ((module >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, third, fourth)
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _kept(
    x, kept_places, factors, numbers, bits, i, o_row, o_column, n, m,
    T: tl.constexpr, TRIM: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """``v_i``: what is kept of ``x_i``."""
    p_factor = factors + i * FACTOR_COLUMNS
    p_number = numbers + i * NUMBER_COLUMNS
    number = o_row[:, None] * m + o_column[None, :]
    if TRIM == MAGNITUDE:
        kept = _held(tl.abs(x), tl.load(p_number + 1).to(T), tl.load(p_factor + 3), number)
        if HIGH:
            kept &= ~_held(tl.abs(x), tl.load(p_number + 2).to(T), tl.load(p_factor + 4), number)
    elif TRIM == RANDOM:
        kept = _word(number, tl.load(p_factor + 6), tl.load(p_factor + 7)) < tl.load(p_factor + 5)
    elif TRIM == BITS:
        words = (m + 63) // 64
        o_word = ((tl.zeros_like(o_row) + i) * n + o_row)[:, None] * words + (o_column // 64)[None, :]
        inside = (o_row < n)[:, None] & (o_column < m)[None, :]
        kept = ((tl.load(bits + o_word, mask=inside, other=0) >> (o_column % 64)[None, :]) & 1) != 0
    elif TRIM == VARIANCE:
        kept = kept_places
    else:
        kept = x == x
    return tl.where(kept, x, 0.0)


@triton.jit
def _varied(factors, numbers, k, o_row, o_column, n, m, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The variances of the places of a tile."""
    total = tl.zeros((ROWS, COLUMNS), T)
    for i in range(0, k):
        total += _elements(factors, numbers, i, o_row, o_column, n, m, T, ROWS, COLUMNS)
    share = _quotient(tl.full((1, 1), 1.0, T), tl.zeros((1, 1), T) + k, T)
    mean = total * share
    squares = tl.zeros((ROWS, COLUMNS), T)
    for i in range(0, k):
        off = _elements(factors, numbers, i, o_row, o_column, n, m, T, ROWS, COLUMNS) - mean
        squares = tl.fma(off, off, squares)
    return squares * share


@triton.jit
def merge_tile(
    factors,  # int64 [k, 8]
    numbers,  # float64 [k, 6]
    rule,  # float64 [4]: scale, least, instead, the sign of a vote of 0
    bits,  # int64 [k, n, ceil(m / 64)]
    out,  # T [band, m]
    states,  # int8 [band, m]: sign of the vote; 2 where it is 0 and something is kept
    k, n, m, first, last, across,
    T: tl.constexpr, TRIM: tl.constexpr, HIGH: tl.constexpr, ELECT: tl.constexpr, SHARES: tl.constexpr,
    ONLY_VARIANCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``last`` of the merged matrix."""
    tile = tl.program_id(0).to(tl.int64)
    o_row = first + tile // across * ROWS + tl.arange(0, ROWS)
    o_column = (tile % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (o_row < last)[:, None] & (o_column < m)[None, :]
    kept_places = inside
    if TRIM == VARIANCE or ONLY_VARIANCE:
        variance = _varied(factors, numbers, k, o_row, o_column, n, m, T, ROWS, COLUMNS)
        if ONLY_VARIANCE:
            tl.store(out + (o_row - first)[:, None] * m + o_column[None, :], variance, mask=inside)
            return
        number = o_row[:, None] * m + o_column[None, :]
        kept_places = _held(variance, tl.load(numbers + 1).to(T), tl.load(factors + 3), number)
    vote_sum = tl.zeros((ROWS, COLUMNS), T)
    any_kept = tl.zeros((ROWS, COLUMNS), T)
    if ELECT != ALL:
        for i in range(0, k):
            x = _elements(factors, numbers, i, o_row, o_column, n, m, T, ROWS, COLUMNS)
            v = _kept(
                x, kept_places, factors, numbers, bits, i, o_row, o_column, n, m, T, TRIM, HIGH
            )  # fmt: skip
            vote = tl.load(numbers + i * NUMBER_COLUMNS + 3).to(T)
            if ELECT == TOTAL:
                vote_sum = tl.fma(v, tl.zeros_like(v) + vote, vote_sum)
            else:
                voted = v * vote
                vote_sum += (voted > 0).to(T) - (voted < 0).to(T)
            any_kept = tl.maximum(any_kept, tl.abs(v))
    minus = tl.where(vote_sum == 0, tl.load(rule + 3).to(T), vote_sum) < 0
    total = tl.zeros((ROWS, COLUMNS), T)
    divisor = tl.zeros((ROWS, COLUMNS), T)
    for i in range(0, k):
        x = _elements(factors, numbers, i, o_row, o_column, n, m, T, ROWS, COLUMNS)
        v = _kept(x, kept_places, factors, numbers, bits, i, o_row, o_column, n, m, T, TRIM, HIGH)
        p_number = numbers + i * NUMBER_COLUMNS
        if ELECT != ALL:
            voted = v * tl.load(p_number + 3).to(T)
            agrees = tl.where(minus, -voted, voted) > 0
            v = tl.where(agrees, v, 0.0)
            if SHARES:
                divisor += tl.where(agrees, tl.load(p_number + 5).to(T), 0.0)
        total = tl.fma(v, tl.zeros_like(v) + tl.load(p_number + 4).to(T), total)
    if SHARES:
        least, instead = tl.load(rule + 1).to(T), tl.load(rule + 2).to(T)
        total = _quotient(total, tl.where(tl.abs(divisor) < least, instead, divisor), T)
    o_out = (o_row - first)[:, None] * m + o_column[None, :]
    tl.store(out + o_out, total * tl.load(rule).to(T), mask=inside)
    if ELECT != ALL:
        sign = (vote_sum > 0).to(tl.int8) - (vote_sum < 0).to(tl.int8)
        tl.store(states + o_out, tl.where((vote_sum == 0) & (any_kept > 0), 2, sign).to(tl.int8), mask=inside)


def merge_tile_launch(
    tables: tuple[object, object, object, object], out: object, states: object,
    sizes: tuple[int, int, int], band: tuple[int, int], *,
    double: bool, trim: int, high: bool, elect: int, shares: bool, only_variance: bool = False,
) -> Launch:  # fmt: skip
    """``tables``: factors, numbers, rule, bits. ``sizes``: k, n, m. ``band``: its first row and the one behind it."""
    _, _, m = sizes
    across = -(-m // COLUMNS)
    programs = -(-(band[1] - band[0]) // ROWS) * across
    constants = {
        "T": tl.float64 if double else tl.float32, "TRIM": trim, "HIGH": high, "ELECT": elect, "SHARES": shares,
        "ONLY_VARIANCE": only_variance, "ROWS": ROWS, "COLUMNS": COLUMNS,
    }  # fmt: skip
    return Launch(merge_tile, programs, (*tables, out, states, *sizes, *band, across), constants, 8, 1)
