"""RegMean: every module's outputs on its adapters' inputs are kept as well as one update can, arXiv 2212.09849."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.core.factors import Factor, concatenate
from fastlora.core.updates import Update, joint_noise
from fastlora.errors import InputError
from fastlora.merging.forms import inputs as form
from fastlora.merging.forms.inputs import Input


@form.method(
    summary="least squares on inputs: Σ wᵢΔWᵢCᵢ(ΣCⱼ + ρI)⁻¹, Cᵢ = XᵢᵀXᵢ/Nᵢ",
    source="RegMean, arXiv 2212.09849; in factors B stays and A changes",
)
def regmean(adapters: Sequence[Input], *, off_diagonal: float = 0.95, ridge: float = 1e-6) -> Update:
    """``argmin_W Σ_i ‖(W − w_i ΔW_i) X_iᵀ‖²/N_i + ρ‖W‖²``, in factors: ``B = [w_i s_i B_i]``, ``A = [A_i C_i S⁻¹]``.

    ``C_i = X_iᵀX_i/N_i [m, m]`` with its entries beside the diagonal times γ, ``S = Σ_j C_j + ρI``; the rank is
    ``Σ r_i``. Where there are fewer rows than inputs, ``N = Σ N_i < m``, neither is formed: with ``X`` all rows, ``d``
    the diagonal of ``ΣC_j`` and ``D = (1−γ)d + ρ``, ``S = D + γXᵀX``, and Woodbury's identity leaves a matrix of the
    size of the rows. So a module costs ``N·m·min(N, m) + R·m·N`` operations in float64.

    All adapters with the same inputs: the mean, for γ = 1 and ρ → 0. Disjoint inputs: the sum. The adapters' scale does
    not need to be found. Rows of a module where all inputs are zero give zero.

    Args:
        off_diagonal: γ in [0, 1], what entries of C beside the diagonal are multiplied with; the paper uses 0.9 to 0.95
        ridge: ρ as a share of the mean of the diagonal of ΣC, above 0
    """
    if not 0.0 <= off_diagonal <= 1.0 or not ridge > 0:
        raise InputError(f"regmean: off_diagonal={off_diagonal:g} must lie in [0, 1], ridge={ridge:g} above 0")
    rows = [a.scaled_rows() for a in adapters]
    solved = _solved(adapters, rows, off_diagonal, ridge)
    first = adapters[0].update
    left = concatenate([a.update.B.scaled(a.weight * a.update.scaling) for a in adapters])
    right = Factor.of("A", torch.cat(solved).float())
    noise = joint_noise(a.update.noise for a in adapters)
    if not left.rank:
        return replace(first, B=replace(first.B, rank=0, terms=()), A=replace(first.A, rank=0, terms=()), scaling=1.0)
    return Update(left, right, 1.0, first.layout, noise)


def _solved(adapters: Sequence[Input], rows: Sequence[Tensor], gamma: float, ridge: float) -> list[Tensor]:
    """``A_i C_i S⁻¹ [r_i, m]`` of every adapter."""
    stacked = torch.cat(list(rows))
    diagonal = stacked.square().sum(0)  # of ΣC_j
    size = float(diagonal.mean())
    if size == 0.0:
        return [torch.zeros(a.update.rank, stacked.shape[1], dtype=torch.float64) for a in adapters]
    rho = ridge * size
    lessened = (1.0 - gamma) * diagonal + rho  # D
    if len(stacked) >= stacked.shape[1]:
        whole = torch.linalg.cholesky(gamma * (stacked.mT @ stacked) + torch.diag(lessened))
        products = [_times_own(a.right(), x, gamma) for a, x in zip(adapters, rows, strict=True)]
        return [torch.cholesky_solve(product.mT, whole).mT for product in products]
    if gamma == 1.0:
        # A_iX_iᵀ (XXᵀ + ρI)⁻¹ X, where nothing cancels for a small ρ.
        kernel = torch.linalg.cholesky(stacked @ stacked.mT + rho * torch.eye(len(stacked), dtype=torch.float64))
        dual = torch.cholesky_solve(stacked, kernel)  # [N, m]
        parts = torch.split_with_sizes(dual, [len(x) for x in rows])
        return [(a.right() @ x.mT) @ part for a, x, part in zip(adapters, rows, parts, strict=True)]
    scaled = stacked / lessened
    inner = torch.eye(len(stacked), dtype=torch.float64) / gamma + scaled @ stacked.mT if gamma > 0 else None
    found = []
    for adapter, x in zip(adapters, rows, strict=True):
        product = _times_own(adapter.right(), x, gamma) / lessened  # A_i C_i D⁻¹
        if inner is not None:
            product = product - torch.linalg.solve(inner, stacked @ product.mT).mT @ scaled
        found.append(product)
    return found


def _times_own(A: Tensor, x: Tensor, gamma: float) -> Tensor:
    """``A_i C_i [r_i, m]``."""
    return gamma * (A @ x.mT) @ x + (1.0 - gamma) * A * x.square().sum(0)
