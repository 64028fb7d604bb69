"""Chains of projectors that weigh directions by their energy, and eigenvectors one by one for a soft threshold.

With ``ΔW_i = s_i U_i Σ_i V_iᵀ``, a direction counts by ``F_i = σ²/(σ² + ρ σ_1²)``, so that a weak one has no equal
vote: ``P̃_i = U_i F_i U_iᵀ`` takes the place of ``P_i`` in MATH (4). All is of the size of the ranks: with
``U_i = X_i T_i``, ``P̃_1 P̃_2 … P̃_k`` has the eigenvalues of ``F_1 (U_1ᵀU_2) F_2 … F_k (U_kᵀU_1)`` and its eigenvectors
in the columns of ``U_1``. These chains are for settings that the op ``chain`` has not, in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.engine.blocks import ChainBlocks
from fastlora.reference.chain import LEAST_MEAN
from fastlora.runtime.threads import one_thread


def weighted_chain(blocks: ChainBlocks, kind: str, threshold: float, rho: float, cuts: tuple[int, float]) -> ops.Chain:
    """What :func:`fastlora.ops.chain` returns, for ``P̃_i``; ``rho = 0``: for the projectors themselves. Of symmetric
    chains (``palindrome``, ``mean``) the columns of the basis are eigenvectors, in the order of the values.

    ``cuts``: ``rank`` and ``energy`` as the op takes them.
    """
    there = blocks.projected.device
    projected, other = blocks.projected.cpu(), blocks.other.cpu()
    g, k, _, r, _ = projected.shape
    whitened = ops.chain(
        projected.diagonal(dim1=1, dim2=2).movedim(-1, 1).reshape(g * k, 1, 1, r, r).contiguous(),
        other.reshape(g * k, 1, r, r).contiguous(),
        threshold=0.0,
        rtol=blocks.group.rtol,
        rank=cuts[0],
        energy=cuts[1],
        floor=blocks.floor.cpu().reshape(g * k, 1),
    )
    sigma, kept = whitened.sigma.reshape(g, k, r), whitened.kept.reshape(g, k)
    there_are = torch.arange(r) < kept[..., None]
    T = whitened.basis.reshape(g, k, r, r) * there_are[:, :, None]
    squares = sigma.square() / sigma[..., :1].square().clamp(min=torch.finfo(torch.float64).tiny)
    F = torch.where(there_are, squares / (squares + rho), 0.0) if rho > 0.0 else there_are.double()

    with one_thread():
        basis, values, count = _solved(projected, T, F, kind, threshold)
    found = basis, values.to(torch.complex128), count, kept, sigma
    info = whitened.info.reshape(g, k).amax(-1)
    return ops.Chain(*(x.to(there) for x in (*found, info)))


def _solved(projected: Tensor, T: Tensor, F: Tensor, kind: str, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Basis, eigenvalues, and how many are above the threshold."""
    g, k, _, r, _ = projected.shape

    def overlap(i: int, j: int) -> Tensor:  # U_iᵀU_j [g, r, r]
        G = projected[:, i, j] if i <= j else projected[:, j, i].mT
        return T[:, i].mT @ G @ T[:, j]

    if kind == "mean":
        root = F.sqrt()
        weighted = [[root[:, i, :, None] * overlap(i, j) * root[:, j, None] for j in range(k)] for i in range(k)]
        rows = [torch.cat(row, 2) for row in weighted]
        values, vectors = torch.linalg.eigh(torch.cat(rows, 1) / k)
        values, vectors = values.flip(-1), vectors.flip(-1)
        taken = values > max(threshold, LEAST_MEAN)
        scaled = vectors / (k * values.clamp(min=LEAST_MEAN)).sqrt()[:, None]
        basis = (T * root[:, :, None]) @ scaled.reshape(g, k, r, k * r)
    else:
        C = torch.diag_embed(F[:, 0])
        for i in range(1, k):
            C = C @ overlap(i - 1, i) * F[:, i, None]
        values, vectors = _eigenvectors(C, None if kind == "palindrome" else overlap(k - 1, 0), threshold)
        taken = values.real > threshold
        basis = torch.zeros(g, k, r, r, dtype=torch.float64)
        basis[:, 0] = T[:, 0] @ vectors
    return basis * taken[:, None, None], values, taken.sum(-1)


def _eigenvectors(C: Tensor, closing: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and an orthonormal basis of what is above the threshold in its first columns:
    of ``C Cᵀ``, whose columns are eigenvectors, or of ``C · closing``."""
    if closing is None:
        values, vectors = torch.linalg.eigh(C @ C.mT)
        return values.flip(-1), vectors.flip(-1)
    values, vectors = torch.linalg.eig(C @ closing)
    order = torch.argsort(values.real, dim=-1, descending=True, stable=True)
    values, vectors = values.gather(-1, order), vectors.gather(-1, order[:, None].expand_as(vectors))
    bases = torch.zeros(vectors.shape, dtype=torch.float64)
    for g, count in enumerate((values.real > threshold).sum(-1).tolist()):
        if count:  # a real subspace of this dimension
            span = torch.cat([vectors[g, :, :count].real, vectors[g, :, :count].imag], 1)
            bases[g, :, :count] = torch.linalg.svd(span, full_matrices=False)[0][:, :count]
    return values, bases
