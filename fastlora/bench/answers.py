"""What is right, by ways of its own: results are held against it before they are timed, and it is not timed itself."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.bench.opponents import shared_part, stacked


def unique_parts(pool: Pool, threshold: float) -> list[list[Tensor]]:
    """Of every module ``B_i − Z Zᵀ B_i`` in float64. ``Z`` spans the eigenvectors of the product of projections above
    the threshold, here on orthonormal bases ``Q_i`` of the ``B_i``, which have full rank."""
    results = []
    for module in pool.modules:
        updates = [a.updates[module] for a in pool.adapters if module in a]
        B = [x.double() for u in updates if (x := u.B.stored) is not None]
        Q = [torch.linalg.qr(b)[0] for b in B]
        product = torch.eye(Q[0].shape[1], dtype=torch.float64)
        for one, next_one in itertools.pairwise([*Q, Q[0]]):
            product = product @ (one.mT @ next_one)
        Z = Q[0] @ shared_part(product, threshold)
        results.append([b - Z @ (Z.mT @ b) for b in B])
    return results


def best_sum(pool: Pool, rank: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Best rank-``rank`` approximation of the sum: QR of the stacked factors, SVD of the small core."""
    results = []
    for module in pool.modules:
        B, A = stacked(pool, module)
        qb, rb = torch.linalg.qr(B)
        qa, ra = torch.linalg.qr(A.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT)
        results.append((qb @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa.mT))
    return results
