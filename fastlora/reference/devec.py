"""DeVec on dense matrices in float64, MATH section 3 as it is written: ``n×n`` projectors and their chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Everything the dense algorithm computes, for ``side="left"``; on the right side ``n`` is ``m``."""

    projectors: list[Tensor]
    """``P_i [n, n]``, MATH (1)."""
    kept: list[int]
    """Rank of every ``P_i``."""
    sigma: list[Tensor]
    """Singular values of every ``ΔW_i``, descending, all of them."""
    operator: Tensor
    """``[n, n]``: ``P_1…P_k``, ``CCᵀ`` with ``C = P_1…P_k``, or ``(1/k)ΣP_i``; MATH (4)."""
    values: Tensor
    """complex128 ``[n]``: all eigenvalues of ``operator``, descending by real part."""
    basis: Tensor
    """``Z [n, q]``: orthonormal basis of the invariant subspace of ``Re λ > τ``, MATH (6)."""
    taken: Tensor
    """``f [q]``: how much of every direction is shared; 1, but for a soft threshold."""
    shared: list[Tensor]
    """``P_shared ΔW_i [n, m]``, MATH (7)."""
    unique: list[Tensor]
    """``ΔW_i − P_shared ΔW_i``, MATH (8)."""
    merged: Tensor
    """``Σ ω_i shared_i`` with weights in proportion to ``‖shared_i‖_F``, MATH (10)."""

    @property
    def projector(self) -> Tensor:
        """``P_shared = Z f Zᵀ``."""
        return self.basis * self.taken @ self.basis.mT


def devec(
    deltas: Sequence[Tensor],
    threshold: float = 0.85,
    *,
    chain: str = "product",
    side: str = "left",
    rank: int | None = None,
    energy: float | None = None,
    rtol: float = 1e-6,
    floors: Sequence[float] | None = None,
    rho: float = 0.0,
    edge: float | None = None,
) -> Dense:
    """Shared and unique parts of dense updates ``ΔW_i [n, m]``.

    Args:
        deltas: updates of one shape, scaling included.
        threshold: ``τ``, above 0: the spectral projector of a nonsymmetric chain is computed at the shift ``τ``.
        chain, side, rank, energy, rtol: as in :func:`fastlora.decompose`.
        rho: weighs directions, ``P_i = U_i F_i U_iᵀ`` with ``F_i = σ²/(σ² + ρ σ_1²)``.
        edge: soft threshold: ``f = (λ − edge)/(1 − edge)`` of every eigenvector is shared, where that is above 0; takes
            the place of ``threshold``, and needs a symmetric chain.
        floors: singular values of ``ΔW_i`` at or below ``floors[i]`` are noise too; 0 for all by default.

    Cost: ``O(n³)``, with a singular value decomposition of every update.
    """
    w = [d.double() if side == "left" else d.double().mT for d in deltas]
    frames, sigma, projectors = [], [], []
    for i, delta in enumerate(w):
        u, s, _ = torch.linalg.svd(delta, full_matrices=False)
        frames.append(u[:, : directions(s, rank, energy, rtol, floors[i] if floors else 0.0)])
        sigma.append(s)
        squares = s[: frames[-1].shape[1]].square()
        projectors.append(frames[-1] * (squares / (squares + rho * s[0].square())) @ frames[-1].mT)
    m = operator(projectors, chain)
    values = torch.linalg.eigvalsh(m).to(torch.complex128) if chain != "product" else torch.linalg.eigvals(m)
    values = values[torch.argsort(values.real, descending=True, stable=True)]
    if edge is None:
        z = invariant_subspace(m, threshold, chain != "product")
        taken = torch.ones(z.shape[1], dtype=torch.float64)
    else:
        levels, vectors = torch.linalg.eigh(m)
        fractions = ((levels - edge) / (1.0 - edge)).clamp(0.0, 1.0)
        z, taken = vectors[:, fractions > 0].flip(1), fractions[fractions > 0].flip(0)
    shared = [z @ (taken[:, None] * (z.mT @ d)) for d in w]
    norms = torch.stack([s.norm() for s in shared])
    weights = norms / norms.sum() if float(norms.sum()) > 0 else torch.zeros_like(norms)
    merged = sum((x * s for x, s in zip(weights, shared, strict=True)), torch.zeros_like(w[0]))
    unique = [d - s for d, s in zip(w, shared, strict=True)]
    if side == "right":
        shared, unique, merged = [s.mT for s in shared], [u.mT for u in unique], merged.mT
    return Dense(projectors, [u.shape[1] for u in frames], sigma, m, values, z, taken, shared, unique, merged)


def directions(sigma: Tensor, rank: int | None, energy: float | None, rtol: float, floor: float) -> int:
    """How many of the descending ``sigma`` stay: above the noise, at most ``rank``, the fewest with the share
    ``energy`` of what is above the noise."""
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    keep = int((sigma > max(rtol * float(sigma[0]), floor)).sum())
    if energy is not None and keep:
        squares = sigma[:keep].square().cumsum(0)
        keep = min(keep, int((squares < energy * squares[-1]).sum()) + 1)
    return keep if rank is None else min(keep, rank)


def operator(projectors: Sequence[Tensor], chain: str) -> Tensor:
    """The ``n×n`` matrix whose large eigenvalues mark what is shared, MATH section 3."""
    if chain == "mean":
        return torch.stack(list(projectors)).mean(0)
    product = projectors[0]
    for p in projectors[1:]:
        product = product @ p
    return product if chain == "product" else product @ product.mT


def invariant_subspace(m: Tensor, threshold: float, symmetric: bool) -> Tensor:
    """Orthonormal basis of the real invariant subspace of the eigenvalues with ``Re λ > threshold``.

    A nonsymmetric matrix: the range of the spectral projector ``½(I + sign(M − τI))``, whose trace is the dimension.
    """
    vectors: Tensor
    if symmetric:
        values, vectors = torch.linalg.eigh(m)
        return vectors[:, values > threshold]
    eye = torch.eye(m.shape[0], dtype=m.dtype)
    projector = (eye + matrix_sign(m - threshold * eye)) / 2
    vectors, _, _ = torch.linalg.svd(projector)
    return vectors[:, : round(float(projector.trace()))]


def matrix_sign(x: Tensor) -> Tensor:
    """``sign(X)`` by Newton's iteration ``X ← ½(X + X⁻¹)``, scaled by the determinant while it is far from done."""
    for _ in range(100):
        inverse: Tensor = torch.linalg.inv(x)
        scale = float(torch.exp(-torch.linalg.slogdet(x)[1] / x.shape[0]))
        scale = scale if float((x - inverse).norm()) > 0.1 * float(x.norm()) else 1.0
        following = (scale * x + inverse / scale) / 2
        if float((following - x).norm()) <= 1e-13 * float(x.norm()):
            return following
        x = following
    return x
