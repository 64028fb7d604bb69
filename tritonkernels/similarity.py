"""similarity: two tiles of stacked updates U_i R_i against each other, a pair of tiles a program.

    inner[i, j]  = Σ_ab (U_iᵀU_j)_ab (R_iR_jᵀ)_ab        shared[i, j] = Σ_ab (U_iᵀU_j)_ab² of what is kept

Every adapter has RANK columns, a power of two, zero beyond its own; a tile has WIDTH, some whole adapters. Products are
float32 without tensor-core rounding, in blocks of 256 rows whose sums are then added: the stacks have unit columns, so
errors are about 1e-7. All of a pair is made by one program. No atomics. Floor: ``(n + m)·WIDTH²`` multiply-adds a
program on the float32 cores, for ``4·2·(n + m)·WIDTH`` bytes: bound by operations from WIDTH = 64 on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.launch import Launch

WIDTH = 64  # columns of a tile
DEPTH = tl.constexpr(16)  # rows of a step
STEPS = tl.constexpr(16)  # of a block


@triton.jit
def _products(stack, length, columns, o_left, o_right, WIDTH: tl.constexpr):
    """``XᵀY [WIDTH, WIDTH]`` of two groups of columns of a stack ``[length, columns]``."""
    total = tl.zeros((WIDTH, WIDTH), tl.float32)
    for block in range(0, length, DEPTH * STEPS):
        part = tl.zeros((WIDTH, WIDTH), tl.float32)
        for step in range(0, STEPS):
            o_row = tl.arange(0, DEPTH).to(tl.int64) + (block + step * DEPTH)
            inside = (o_row < length)[:, None]
            x = tl.load(stack + o_row[:, None] * columns + o_left[None, :], mask=inside, other=0.0)
            y = tl.load(stack + o_row[:, None] * columns + o_right[None, :], mask=inside, other=0.0)
            part = tl.dot(tl.trans(x), y, part, input_precision="ieee")
        total += part
    return total


@triton.jit
def compare_tiles(
    left,  # float32 [n, columns]
    right,  # float32 [m, columns]
    counted,  # float32 [columns]: 1 for what counts in `shared`, else 0
    pairs,  # int64 [programs, 2]: tiles
    inner,  # float64 [adapters, adapters]
    shared,  # float64 [adapters, adapters]
    n,
    m,
    columns,
    adapters,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    TALL: tl.constexpr = WIDTH // RANK
    p_pair = pairs + tl.program_id(0).to(tl.int64) * 2
    first, second = tl.load(p_pair), tl.load(p_pair + 1)
    o_left, o_right = first * WIDTH + tl.arange(0, WIDTH), second * WIDTH + tl.arange(0, WIDTH)
    u = _products(left, n, columns, o_left, o_right, WIDTH)
    r = _products(right, m, columns, o_left, o_right, WIDTH)
    product = tl.reshape(u * r, (TALL, RANK, TALL, RANK))
    counts = tl.load(counted + o_left)[:, None] * tl.load(counted + o_right)[None, :]
    square = tl.reshape(u * u * counts, (TALL, RANK, TALL, RANK))
    o_out = (first * TALL + tl.arange(0, TALL))[:, None] * adapters + (second * TALL + tl.arange(0, TALL))[None, :]
    tl.store(inner + o_out, tl.sum(tl.sum(product, 3), 1).to(tl.float64))
    tl.store(shared + o_out, tl.sum(tl.sum(square, 3), 1).to(tl.float64))


def compare_tiles_launch(
    programs: int, left: object, right: object, counted: object, pairs: object, inner: object, shared: object,
    sizes: tuple[int, int, int, int], *, rank: int,
) -> Launch:  # fmt: skip
    """``sizes``: n, m, columns, adapters; the last two are whole tiles. ``rank``: a power of two, at most ``WIDTH``."""
    constants = {"WIDTH": WIDTH, "RANK": rank}
    return Launch(compare_tiles, programs, (left, right, counted, pairs, inner, shared, *sizes), constants, 8, 2)
