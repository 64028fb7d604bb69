"""SSR: the router of a static merge, least squares on inputs within the rows of the adapters, arXiv 2606.10617."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastlora.core.factors import concatenate
from fastlora.core.updates import Update, joint_noise
from fastlora.errors import InputError
from fastlora.merging.forms import inputs as form
from fastlora.merging.forms.inputs import Input


@form.method(
    summary="B·Q(G + λI)⁻¹·A with G = Σ zzᵀ, z = Ax over all inputs, Q its rows by owner",
    source="SSR-Merge, arXiv 2606.10617, in closed form",
)
def ssr(adapters: Sequence[Input], *, ridge: float = 1e-4) -> Update:
    """``ΔW = [s_i B_i] M A`` with the router ``M = argmin Σ_i ‖(M − w_i E_i) A X_iᵀ‖²/N_i + λ‖M‖²``, ``[R, R]``.

    ``A [R, m]`` are the stacked factors, ``E_i`` keeps the rows of adapter ``i``: ``[s_i B_i] E_i A = ΔW_i``. With
    ``z = A x [R]`` for every input, ``G = Σ_i Z_iZ_iᵀ/N_i``, and ``Q`` the rows of each adapter from its own
    ``w_i Z_iZ_iᵀ/N_i``: ``M = Q (G + λI)⁻¹``. Rank ``Σ r_i``; the result stays on the stored factors, and no matrix is
    larger than the rows: ``R·m·ΣN_i`` operations a module. It depends on how ``ΔW_i`` is factored through ``λ`` alone.
    The paper takes its inputs with each adapter on its model. A module where all inputs are zero is zero.

    Args:
        ridge: λ as a share of the mean of the diagonal of G, above 0; the paper has an absolute 1e-4
    """
    if not ridge > 0:
        raise InputError(f"ssr: ridge={ridge:g} must be above 0")
    first = adapters[0].update
    ranks = [a.update.rank for a in adapters]
    total = sum(ranks)
    G = torch.zeros(total, total, dtype=torch.float64)
    Q = torch.zeros_like(G)
    stacked = torch.cat([a.right() for a in adapters])
    at = 0
    for adapter, rank in zip(adapters, ranks, strict=True):
        z = stacked @ adapter.scaled_rows().mT  # [R, N]
        own = z @ z.mT
        G += own
        Q[at : at + rank] = adapter.weight * own[at : at + rank]
        at += rank
    size = float(G.diagonal().mean()) if total else 0.0
    if size == 0.0:
        return replace(first, B=replace(first.B, rank=0, terms=()), A=replace(first.A, rank=0, terms=()), scaling=1.0)
    shifted = G + ridge * size * torch.eye(total, dtype=torch.float64)
    router = torch.cholesky_solve(Q.mT, torch.linalg.cholesky(shifted)).mT
    left = concatenate([a.update.B.scaled(a.update.scaling) for a in adapters])
    right = concatenate([a.update.A for a in adapters])
    return Update(left.times(router), right, 1.0, first.layout, joint_noise(a.update.noise for a in adapters))
