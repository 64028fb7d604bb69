"""What is right, by ways of its own: results are held against it before they are timed, and it is not timed itself."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.bench.opponents import shared_part


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
