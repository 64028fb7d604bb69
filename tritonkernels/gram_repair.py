"""repair_blocks: blocks of half_sums again, in float64, where float32 may not hold their sums. See gram.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.gram_exact import pair_sum
from tritonkernels.gram_half import WIDTH
from tritonkernels.gram_write import BLOCK_COLUMNS, store_block
from tritonkernels.values import SLAB, SLAB_COLUMNS

SMALLEST, LARGEST = tl.constexpr(1e-20), tl.constexpr(1e30)  # squared column norms that float32 sums are trusted with


@triton.jit
def _out_of_range(p_blocks, is_block, column: tl.constexpr, slabs, parts):
    """How many columns of a slab have a squared norm that float32 sums are not trusted with, for some blocks.

    ``column``: 0 for the left slabs, 1 for the right ones.
    """
    slab = tl.load(p_blocks + 8 + column, mask=is_block, other=0)
    place = tl.load(p_blocks + 10 + column, mask=is_block, other=0)
    distance = tl.load(p_blocks + 13 + column, mask=is_block, other=0)
    units = tl.load(p_blocks + 2, mask=is_block, other=0)
    width = tl.load(slabs + slab * SLAB_COLUMNS + 2, mask=is_block, other=0)
    o_slab = tl.arange(0, SLAB)[None, :]
    is_column = o_slab < width[:, None]
    square = tl.zeros((p_blocks.shape[0], SLAB), tl.float64)
    for unit in range(0, tl.max(units, 0).to(tl.int32)):
        pointers = parts + (place + unit * distance)[:, None] + o_slab * (WIDTH + 1)
        square += tl.load(pointers, mask=is_column & (unit < units)[:, None], other=0.0)
    is_held = (square >= SMALLEST) & (square <= LARGEST)
    return tl.sum((is_column & (is_held == 0)).to(tl.int32), 1)


@triton.jit(do_not_specialize=["count"])
def repair_blocks(
    blocks,  # int64 [count, 16], of both sides
    slabs,  # int64 [slabs, 4]
    parts,  # float64, what half_sums wrote
    count,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    REPAIRED: tl.constexpr,  # blocks of a program
):
    first = tl.program_id(0).to(tl.int64) * REPAIRED
    o_block = first + tl.arange(0, REPAIRED)
    p_blocks = blocks + o_block * BLOCK_COLUMNS
    bad = _out_of_range(p_blocks, o_block < count, 0, slabs, parts)
    bad += _out_of_range(p_blocks, o_block < count, 1, slabs, parts)
    if tl.sum(bad, 0) > 0:
        for i in range(0, REPAIRED):
            if tl.sum(tl.where(tl.arange(0, REPAIRED) == i, bad, 0), 0) > 0:
                p_block = blocks + (first + i) * BLOCK_COLUMNS
                left, right, last = tl.load(p_block + 8), tl.load(p_block + 9), tl.load(p_block + 12)
                rows = tl.load(p_block + 15) != 0
                total = pair_sum(slabs, left, right, last * 0, last, rows, None, DTYPE, False, LANES)
                store_block(p_block, slabs, total)
