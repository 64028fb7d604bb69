"""WUDI in closed form: a regression on the row spaces of the updates, arXiv 2503.08099, with a ridge."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastlora import ops
from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import product_svd, significant, squared_norms
from fastlora.merging.forms.frames import Cut


@cores.method(
    summary="argmin_X Σ ‖(X − wᵢΔWᵢ)Cᵢ^½‖² + ρ‖X − X₀‖², rows of ΔWᵢ in place of inputs",
    source="WUDI-Merging, arXiv 2503.08099, solved with a ridge in place of 300 steps of Adam",
    whole=True,
)
def wudi(
    stack: Tensor,
    sides: tuple[Tensor, Tensor],
    noise: Cut,
    *,
    ridge: float = 0.1,
    inputs: Literal["energy", "projector"] = "energy",
    towards: Literal["sum", "zero"] = "sum",
) -> Tensor:
    """``X = (Σ_i X_i C_i + ρ X₀)(Σ_i C_i + ρI)⁻¹`` with ``X_i = w_i ΔW_i``: one ``R×R`` solve a module.

    ``C_i`` stands for the covariance of the inputs of task ``i``: ``X_iᵀX_i/‖X_i‖²`` (``energy``, the loss of WUDI), or
    the projection on the row space of ``X_i`` (``projector``). ``ρ`` is ``ridge`` times the largest eigenvalue of
    ``Σ C_i``. ``X₀`` is where the paper's steps start, the sum of the ``X_i`` (stopping early stays near it), or zero.

    With ``towards="sum"`` one adapter stays as it is. Trap: adapters with a common initial ``A`` have nearly one row
    space, and without a ridge the solution was 7 to 21 times too long there; so ``ridge`` must be above 0.

    Args:
        ridge: ρ, relative to the largest eigenvalue of Σ Cᵢ, above 0
        inputs: what stands for the inputs of a task, rows by their energy or the projector on their span
        towards: what the ridge draws to, the sum of the updates or zero
    """
    if not ridge > 0:
        raise InputError(f"wudi: ridge={ridge:g} must be above 0, or nothing bounds the result")
    if inputs == "energy":
        squares = squared_norms(stack)[:, :, None, None]
        proxies = torch.where(squares > 0, (stack.mT @ stack) / torch.where(squares > 0, squares, 1.0), 0.0)
    else:
        _, sigma, V = product_svd(*sides)
        V = V * significant(noise, sigma)[:, :, None]
        proxies = V @ V.mT
    total = proxies.sum(1)
    values, vectors = ops.eigh(total)
    rho = ridge * values[:, -1:].clamp(min=0)  # [g, 1]
    right = (stack @ proxies).sum(1)
    if towards == "sum":
        right = right + rho[:, :, None] * stack.sum(1)
    inverse = torch.where(rho > 0, 1.0 / (values.clamp(min=0) + torch.where(rho > 0, rho, 1.0)), 0.0)
    return ((right @ vectors) * inverse[:, None]) @ vectors.mT
