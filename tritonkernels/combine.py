"""combine: results that are linear combinations of a pool's factors, ``out[:, at:at+q] += scale · X C``.

    B side: X = B_i [n, r], C [r, q].   A side (ROWS): X = A_iᵀ, stored as A_i [r, n], C stored as [q, r].

A program makes one tile of one result, [rows, columns] with the long dimension first, and walks the result's terms.
Programs of one stretch of rows follow one another, so a factor that goes into many results comes from memory once and
from the cache thereafter. Here are the launches; a kernel has a file of its own, combine_{half,exact,extreme}.py.

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

import triton.language as tl

from tritonkernels.combine_exact import exact_results
from tritonkernels.combine_extreme import extreme_results
from tritonkernels.combine_half import half_results
from tritonkernels.launch import INTERPRETED, Launch
from tritonkernels.values import DTYPES

INNER = 16  # columns of X in a product of half_results; sums are made in this order whatever the tile
HALF_TILES = {16: 256, 32: 128, 64: 128}
"""Rows of a tile of half_results, by its columns."""
ROUGH_TILES = {False: (64, 16), True: (64, 32)}
"""Rows and columns of a tile of half_results without vector loads, by whether addresses are odd: without spills."""
EXACT_TILE = (512 if INTERPRETED else 128, 16)  # rows and columns of a tile of exact_results


def half_results_launch(
    programs: int, tiles: object, terms: object, *,
    rows: bool, code: int, out: int, odd: bool, vector: int, tall: int, wide: int,
) -> Launch:  # fmt: skip
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "OUT": DTYPES[out], "BYTES": odd, "VECTOR": vector}
    constants |= {"TALL": tall, "WIDE": wide, "INNER": INNER}
    # TF32 pieces take twice the registers of bfloat16 ones: with four warps a tall tile of them spills on sm_80.
    warps = 8 if DTYPES[code] == tl.float16 and tall == 256 else 4
    return Launch(half_results, programs, (tiles, terms), constants, warps, 1)


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
