"""gram: blocks G_ij = X_iᵀ X_j of the tall factors of a pool's modules, in float64.

    B side: X_i = B_i [n, r_i].   A side (ROWS): X_i = A_iᵀ, stored as A_i [r_i, n].

Here are the launches; a kernel has a file of its own, gram_{half,exact,write,repair}.py.

Factors are cut into slabs of 16 columns of X. Two ways to sum the products of slabs over a unit of the long dimension:

* ``half_sums``: float16 and bfloat16 on tensor cores, 4 slabs by 4 slabs a program. Tensor cores truncate their float32
  sums, so every 64 rows each column is split, exactly, into multiples of a unit, whose products are summed without any
  rounding, and a remainder, 2⁻⁹ of its largest element at the most, whose products are rounded. Sums of 64 rows go into
  a float32 pair (a sum and the rounding errors). An inner product is known to about 2⁻³¹ of ``‖x‖‖y‖`` so. float64
  needs five times as long, since it has no tensor cores in Triton.
* ``exact_sums``: fused multiply-add in float64, a program a pair of slabs. float32, float64, mixed and short factors.

``write_blocks`` adds the units of each pair of slabs in order and writes it into the caller's block. ``repair_blocks``
follows ``half_sums``: where squared column norms say that float32 may have overflowed or underflowed, it sums a pair
again in float64; else it only looks. Both take all sides and jobs whose parts have room at a time.

Units depend on the long dimension alone, and every product of slabs is summed by the same instructions in the same
order wherever it lies, so bits do not depend on the pool. No atomics.
Floor: each factor read once, Σ n·r_i·sizeof bytes; ``half_sums`` reads one that is in several groups of slabs
again for each of those, and does 6·n·W² operations a product on tensor cores; ``exact_sums`` does 2·n·256 a pair of
slabs.
"""

from __future__ import annotations

from tritonkernels.gram_exact import exact_sums
from tritonkernels.gram_half import half_sums
from tritonkernels.gram_repair import repair_blocks
from tritonkernels.gram_write import write_blocks
from tritonkernels.launch import INTERPRETED, Launch
from tritonkernels.values import DTYPES

DEPTH = 64  # rows of a tile of half_sums, and of its float32 sums: 2·9 bits and these are the 24 that float32 has
LANES = 64 if INTERPRETED else 8  # rows that exact_sums handles side by side; the interpreter counts steps
REPAIRED = 32  # blocks that a program of repair_blocks looks after


def half_sums_launch(
    programs: int, tiles: object, slabs: object, parts: object, *, rows: bool, code: int, vector: int, one_group: bool
) -> Launch:
    """``one_group``: the products of groups of slabs with themselves, else those of two groups."""
    constants = {"ROWS": rows, "DTYPE": DTYPES[code], "VECTOR": vector, "ONE_GROUP": one_group, "DEPTH": DEPTH}
    # Without vector loads every element takes an address, which is too much for the registers of 4 warps.
    warps, stages = (4, 5) if vector > 1 else (8, 3)
    return Launch(half_sums, programs, (tiles, slabs, parts), constants, warps, stages)


def exact_sums_launch(
    programs: int, pairs: object, slabs: object, parts: object, *, rows: bool, code: int | None, odd: bool
) -> Launch:
    """``code`` None: factors of several dtypes."""
    constants = {"ROWS": rows, "DTYPE": None if code is None else DTYPES[code], "BYTES": odd, "LANES": LANES}
    return Launch(exact_sums, programs, (pairs, slabs, parts), constants, 4, 1)


def write_blocks_launch(programs: int, blocks: object, slabs: object, parts: object) -> Launch:
    return Launch(write_blocks, programs, (blocks, slabs, parts), {}, 1, 1)


def repair_blocks_launch(count: int, blocks: object, slabs: object, parts: object, *, code: int) -> Launch:
    constants = {"DTYPE": DTYPES[code], "LANES": LANES, "REPAIRED": REPAIRED}
    return Launch(repair_blocks, -(-count // REPAIRED), (blocks, slabs, parts, count), constants, 4, 1)
