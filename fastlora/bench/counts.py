"""What a decomposition must at least move and compute, by the shapes of its pool and of what is shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.ops.gram import blocks_of

Operations = dict[torch.dtype, float]
"""How many operations of each dtype."""


def stored(pool: Pool, side: str) -> list[list[Tensor]]:
    """``[module][adapter]`` stored factors of one side."""
    found = [[getattr(a.updates[m], side).stored for a in pool.adapters if m in a] for m in pool.modules]
    return [[x for x in row if x is not None] for row in found]


def gram_operations(n: int, ranks: Sequence[int], blocks: Iterable[tuple[int, int]]) -> int:
    """Of the blocks ``X_iᵀX_j`` of factors with ``n`` rows: a block on the diagonal is one of its triangles."""
    return sum(n * ranks[i] * (ranks[i] + 1 if i == j else 2 * ranks[j]) for i, j in blocks)


def decomposition(pool: Pool, shared: Adapter) -> tuple[int, Operations]:
    """``(bytes, operations)`` of a decomposition into unique parts and a shared one of rank ``q`` a module.

    Every factor is read once, every unique ``B`` and both shared factors are written once; a unique ``A`` is the stored
    one. Gram blocks are ``chain`` for ``B`` and ``diagonal`` for ``A`` (:func:`blocks_of`), in float64. What is
    combined goes through the shared directions, ``B_1 T [n, q]`` and ``B_i − (B_1 T) H_i``, where that is less than
    ``B_i − B_1 C_i``, and ``Σ C_i A_i [q, m]``: in float32 for half precision, else in float64. The small matrices of a
    module are left out.
    """
    moved, gram, combined = 0, 0, 0
    for module, left, right in zip(pool.modules, stored(pool, "B"), stored(pool, "A"), strict=True):
        (n, m), k = (left[0].shape[0], right[0].shape[1]), len(left)
        ranks = [B.shape[1] for B in left]
        q = shared.updates[module].rank if module in shared else 0
        size = left[0].element_size()
        moved += sum(x.nbytes for x in (*left, *right)) + sum(B.nbytes for B in left if q) + size * q * (n + m)
        gram += gram_operations(n, ranks, blocks_of("chain", k)) + gram_operations(m, ranks, blocks_of("diagonal", k))
        left_products = min(q * (ranks[0] + sum(ranks)), ranks[0] * sum(ranks))
        combined += 2 * (n * left_products + m * q * sum(ranks))
    operations: Operations = {torch.float64: float(gram)}
    half = pool.adapters[0].dtype.itemsize == 2
    dtype = torch.float32 if half else torch.float64
    operations[dtype] = operations.get(dtype, 0.0) + combined
    return moved, operations
