"""write_blocks: the sums of the units of every pair of slabs, into the caller's blocks. See gram.py."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.values import SLAB, SLAB_COLUMNS

BLOCK_COLUMNS = tl.constexpr(16)
"""Of `blocks`: place of the first unit's part, distance of units, units, pitch of its rows, pitch of its columns,
whether the lower triangle mirrors the upper, address, stride, left slab, right slab, place of the left and of the right
diagonal, last row, distance of the units of the left and of the right diagonal, 1 for an A side."""


@triton.jit
def write_blocks(
    blocks,  # int64 [programs, 16]
    slabs,  # int64 [slabs, 4]
    parts,  # float64, what half_sums or exact_sums wrote
):
    p_block = blocks + tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    place, distance, units = tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2).to(tl.int32)
    pitch_row, pitch_column, mirrored = tl.load(p_block + 3), tl.load(p_block + 4), tl.load(p_block + 5)
    o_row, o_column = tl.arange(0, SLAB)[:, None], tl.arange(0, SLAB)[None, :]
    low, high = tl.minimum(o_row, o_column), tl.maximum(o_row, o_column)
    is_upper = mirrored == 0
    o_part = tl.where(is_upper, o_row, low) * pitch_row + tl.where(is_upper, o_column, high) * pitch_column
    total = tl.zeros((SLAB, SLAB), tl.float64)
    for unit in range(0, units):
        total += tl.load(parts + place + unit * distance + o_part)
    store_block(p_block, slabs, total)


@triton.jit
def store_block(p_block, slabs, total):
    address, stride = tl.load(p_block + 6), tl.load(p_block + 7)
    height = tl.load(slabs + tl.load(p_block + 8) * SLAB_COLUMNS + 2)
    width = tl.load(slabs + tl.load(p_block + 9) * SLAB_COLUMNS + 2)
    o_row, o_column = tl.arange(0, SLAB)[:, None], tl.arange(0, SLAB)[None, :]
    pointers = address.to(tl.pointer_type(tl.float64)) + o_row * stride + o_column
    tl.store(pointers, total, mask=(o_row < height) & (o_column < width))
