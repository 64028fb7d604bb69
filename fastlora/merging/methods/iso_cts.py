"""Iso-CTS: a flat spectrum on common and task-specific directions, arXiv 2502.04959, at the rank that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora import ops
from fastlora.errors import InputError
from fastlora.merging.forms import cores
from fastlora.merging.forms.bases import polar, product_svd, squared_norms
from fastlora.merging.forms.frames import Cut


@cores.method(
    summary="leading directions of Σ wᵢΔWᵢ beside those of what they leave of every wᵢΔWᵢ, at one singular value",
    source="Iso-CTS, arXiv 2502.04959, restricted to the directions that are kept",
)
def iso_cts(stack: Tensor, sides: tuple[Tensor, Tensor], cut: Cut, *, common: float = 0.8) -> Tensor:
    """``σ̄ U⊥ V⊥ᵀ`` of ``q`` directions: ``q − k t`` of ``X = Σ w_i ΔW_i`` and ``t`` of every adapter.

    With ``U_c`` the leading ``q − k t`` left singular vectors of ``X``, adapter ``i`` adds the ``t`` leading pairs of
    ``(I − U_c U_cᵀ) w_i ΔW_i``, ``t = round((q − ⌊common·q⌋)/k)``. All pairs side by side are made orthogonal
    (``U⊥ = U (UᵀU)^-½``, pseudo-inverse where they are dependent), and get the mean ``σ̄`` of their singular values.

    ``q`` is the number of directions of ``X`` that the rank or the energy keeps; the paper's is ``min(n, m)``, most of
    them of rounding in a sum of LoRA updates. ``k`` counts the updates of a module that are not zero. Where an update
    has fewer than ``t`` directions left above the noise, it adds those. One adapter: `iso_c`. Cost: ``O(R³)`` a module.

    Args:
        common: share of the directions that are those of the sum, in [0, 1]
    """
    if not 0.0 <= common <= 1.0:
        raise InputError(f"iso_cts: common={common:g} must be between 0 and 1")
    L, Rt = sides
    U, sigma, Vt = ops.svd(stack.sum(1))
    q = cut(sigma)
    k = (squared_norms(stack) > 0).sum(1).clamp(min=1)
    t = torch.minimum(((q - (q * common).floor()) / k).round().long(), q // k)  # [g]
    shared = (torch.arange(sigma.shape[1]) < (q - k * t)[:, None]).double()  # [g, R]
    U_c = U * shared[:, None]
    rest = L - U_c[:, None] @ (U_c.mT[:, None] @ L)
    own_U, own_sigma, own_V = product_svd(rest, Rt)
    sizes = product_svd(L, Rt)[1][:, :, :1]  # what the noise of an update is relative to
    floor = torch.maximum(cut.rtol[:, None, None] * sizes, cut.floor[:, None, None])
    own = ((torch.arange(own_sigma.shape[2]) < t[:, None, None]) & (own_sigma > floor)).double()
    left = torch.cat([*(own_U * own[:, :, None]).unbind(1), U_c], 2)
    right = torch.cat([*(own_V * own[:, :, None]).unbind(1), Vt.mT * shared[:, None]], 2)
    used = torch.cat([own.flatten(1), shared], 1)
    sizes = torch.cat([own_sigma.flatten(1), sigma], 1) * used
    mean = sizes.sum(1) / used.sum(1).clamp(min=1)
    return mean[:, None, None] * (polar(left, cut.rtol) @ polar(right, cut.rtol).mT)
