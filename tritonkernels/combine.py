"""combine: results that are linear combinations of a pool's factors, ``out[:, at:at+q] += scale · X C``.

    B side: X = B_i [n, r], C [r, q].   A side (ROWS): X = A_iᵀ, stored as A_i [r, n], C stored as [q, r].

Here are the launches; a kernel has a file of its own, combine_{cut,joint,summed,half,exact,extreme}.py. How a result is
made depends on its own terms alone, and so do its bits.

* ``half_joint``: half-precision results ``scale_i X_i + X C_i`` of one half-precision matrix ``X``, on tensor cores
  with float32 sums. A program has a stretch of rows: it loads X once, and every ``X_i`` while the result before is
  computed.
* ``half_summed``: a half-precision result ``Σ X_i C_i``, likewise, a program a stretch of rows.
* ``half_results``: other half-precision results of half-precision factors: several products and identities, more than
  32 columns, no vector loads. A program has a tile of one result and walks its terms. Programs of one stretch of rows
  follow one another, so a factor that goes into many results comes from memory once and from the cache thereafter.
* ``exact_results``: everything else, fused multiply-add in float64.
* ``cut_coefficients`` comes before the tensor cores: a coefficient is scaled, rounded to float32 and cut into three
  pieces whose products with X are exact: bfloat16 pieces for bfloat16, 11-bit pieces (what TF32 keeps) for float16.
  Pieces are added smallest first. It also says which terms have a coefficient outside [1e-20, 1e20], where float32 may
  overflow or underflow.
* ``extreme_results`` comes after them, and computes the results of such terms in float64; it mostly finds none.

Identity terms are added without a product, and to zero without an addition, so a copy keeps its bits (-0 included).
A result is rounded once, to nearest even: float64 sums by way of a float32 rounded to odd. Bits of a result depend on
its own terms alone.
Floor: every factor read once, every result written once; 2·n·r·q operations a term, three times that on tensor cores.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from tritonkernels.combine_cut import cut_coefficients
from tritonkernels.combine_exact import exact_results
from tritonkernels.combine_extreme import extreme_results
from tritonkernels.combine_half import half_results
from tritonkernels.combine_joint import half_joint
from tritonkernels.combine_summed import half_summed
from tritonkernels.launch import INTERPRETED, Launch
from tritonkernels.values import DTYPES

INNER = 16  # columns of X in a product on tensor cores; sums are made in this order whatever the tile
STRETCHES = {16: 256, 32: 128}
"""Rows of a stretch of half_joint and half_summed, by the columns of a matrix and a result."""
MOST_JOINT = 16  # results of a program of half_joint
# Stages of the loops, with which the compiler has the loads of two steps on their way while a third is computed.
AHEAD = {half_joint: 3, half_summed: 5}
HALF_TILES = {16: 256, 32: 128, 64: 128}
"""Rows of a tile of half_results, by its columns."""
ROUGH_TILES = {False: (64, 16), True: (64, 32)}
"""Rows and columns of a tile of half_results without vector loads, by whether addresses are odd: without spills."""
LOOKED = 32  # results that a program of extreme_results looks after
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


def cut_coefficients_launch(programs: int, cuts: object, flags: object, pieces: object, *, code: int) -> Launch:
    return Launch(cut_coefficients, programs, (cuts, flags, pieces), {"DTYPE": DTYPES[code]}, 2, 1)


def half_joint_launch(programs: int, stretches: object, results: object, pieces: object, **kind: Any) -> Launch:
    """``kind``: rows, code, out, vector, side."""
    return _stretch_launch(half_joint, programs, (stretches, results, pieces), **kind)


def half_summed_launch(programs: int, stretches: object, factors: object, pieces: object, **kind: Any) -> Launch:
    """``kind``: rows, code, out, vector, side."""
    return _stretch_launch(half_summed, programs, (stretches, factors, pieces), **kind)


def _stretch_launch(
    kernel: Any, programs: int, arguments: tuple[object, ...], *,
    rows: bool, code: int, out: int, vector: int, side: int,
) -> Launch:  # fmt: skip
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "OUT": DTYPES[out], "VECTOR": vector}
    constants |= {"TALL": STRETCHES[side], "SIDE": side, "INNER": INNER, "AHEAD": AHEAD[kernel]}
    # TF32 pieces take twice the registers of bfloat16 ones.
    warps = 8 if DTYPES[code] == tl.float16 and side == 32 else 4
    return Launch(kernel, programs, arguments, constants, warps, 1)


def extreme_results_launch(
    count: int, results: object, terms: object, flags: object, *, rows: bool, code: int, out: int, odd: bool
) -> Launch:
    constants = _exact_constants(rows, code, out, odd) | {"LOOKED": LOOKED}
    return Launch(extreme_results, -(-count // LOOKED), (results, terms, flags, count), constants, 4, 1)
