"""coefficients: from a basis to the coefficients of shared and unique parts, MATH (7)–(10), in float64.

    H_i = Σ_j basis_jᵀ G_ji [w, r],  ‖ΔW_i‖² = s_i² Σ G_ii ∘ A_i,  ‖ΔW_i^shared‖² = s_i² Σ_t h_t A_i h_tᵀ,
    removal_ij = -strength_i basis_j H_i [r, r],  mixing_i = ω_i s_i H_i,  ω_i = ‖ΔW_i^shared‖ / Σ_j ‖ΔW_j^shared‖

A program an adapter of a module; ``mix`` is a launch of its own since ω needs the norms of all adapters of the module.
Sums run in a fixed order that does not depend on the other modules, so bits do not either.
Bytes: 8·(2·r² + r·w + 2·r·w + movers·r²) an adapter, all of it in L2 after the chain. Operations: 2·r²·w·(2 + movers).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce(
    projected,  # [g, k, k, r, r], blocks i <= j
    other,  # [g, k, r, r]
    basis,  # [g, k, r, w]
    scaling,  # [g, k]
    strength,  # [g, k]
    H,  # [g, k, w, r]
    norms,  # [g, k]
    shared,  # [g, k]
    removal,  # [g, k, movers, r, r], with the strides of its last two dimensions
    k,
    r,
    w,
    movers,
    removal_row,
    removal_column,
    R: tl.constexpr,  # a power of two, r at the least
):
    place = tl.program_id(0).to(tl.int64)
    module, i = place // k, place % k
    o = tl.arange(0, R)
    mask = o < r
    m_square = mask[:, None] & mask[None, :]
    o_square = o[:, None] * r + o[None, :]
    size = r * r
    p_blocks = projected + module * k * k * size
    scale = tl.abs(tl.load(scaling + place))
    A = tl.load(other + place * size + o_square, mask=m_square, other=0.0)
    own = tl.load(p_blocks + (i * k + i) * size + o_square, mask=m_square, other=0.0)
    square = tl.sum(tl.sum(own * A, 1), 0)
    tl.store(norms + place, tl.sqrt(tl.where(square < 0.0, 0.0, square)) * scale)

    square = square * 0.0
    for t in range(0, w):
        h = tl.zeros((R,), tl.float64)
        for j in range(0, movers):
            b = tl.load(basis + ((module * k + j) * r + o) * w + t, mask=mask, other=0.0)
            # Block (j, i), which lies as (i, j) transposed where i < j.
            low, high = tl.minimum(i, j), tl.maximum(i, j)
            stored = (j <= i).to(tl.int64)
            o_block = o[:, None] * (1 + stored * (r - 1)) + o[None, :] * (r - stored * (r - 1))
            G = tl.load(p_blocks + (low * k + high) * size + o_block, mask=m_square, other=0.0)
            h += tl.sum(b[:, None] * G, 0)
        tl.store(H + (place * w + t) * r + o, h, mask=mask)
        square += tl.sum(tl.sum(h[None, :] * A, 1) * h, 0)
    tl.store(shared + place, tl.sqrt(tl.where(square < 0.0, 0.0, square)) * scale)

    tl.debug_barrier()  # H is read by other threads than wrote it
    p_removal = removal + place * movers * size
    factor = -tl.load(strength + place)
    for j in range(0, movers):
        total = tl.zeros((R, R), tl.float64)
        for t in range(0, w):
            b = tl.load(basis + ((module * k + j) * r + o) * w + t, mask=mask, other=0.0)
            h = tl.load(H + (place * w + t) * r + o, mask=mask, other=0.0)
            total += b[:, None] * h[None, :]
        o_out = o[:, None] * removal_row + o[None, :] * removal_column
        tl.store(p_removal + j * size + o_out, factor * total, mask=m_square)


@triton.jit
def mix(
    H,  # [g, k, w, r]
    shared,  # [g, k]
    scaling,  # [g, k]
    mixing,  # [g, k, w, r], with the strides of its last two dimensions
    k,
    r,
    w,
    mixing_row,
    mixing_column,
    K: tl.constexpr,  # powers of two, k and r at the least
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    o_adapter = tl.arange(0, K)
    every = tl.load(shared + place // k * k + o_adapter, mask=o_adapter < k, other=0.0)
    total = tl.sum(every, 0)
    omega = tl.where(total > 0.0, tl.load(shared + place) / total, 0.0) * tl.load(scaling + place)
    o = tl.arange(0, R)
    for start in range(0, w, ROWS):
        o_row = start + tl.arange(0, ROWS)
        mask = (o_row < w)[:, None] & (o < r)[None, :]
        h = tl.load(H + (place * w + o_row[:, None]) * r + o[None, :], mask=mask, other=0.0)
        p_out = mixing + place * w * r + o_row[:, None] * mixing_row + o[None, :] * mixing_column
        tl.store(p_out, omega * h, mask=mask)
