"""SLERP: the way between two updates on a sphere, in every module by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import weights

STRAIGHT = 0.9995
"""``|cos θ|`` from which on the way is straight: what is left of a sphere is rounding, or has no one direction."""


@weights.method(
    summary="spherical interpolation from the first of two wᵢΔWᵢ to the second",
    source="SLERP (Shoemake 1985) on ΔW; mergekit's convention, with the base at 0",
)
def slerp(inner: Tensor, *, t: float = 0.5) -> Tensor:
    """``(sin((1−t)θ)·ΔW_1 + sin(tθ)·ΔW_2) / sin θ``, where ``θ`` is the angle between the two updates of a module.

    It is ``(1−t)·ΔW_1 + t·ΔW_2`` where they lie on a line (``|cos θ| > 0.9995``), or where one of them is zero or
    lacks the module and there is no angle. Updates of one norm, unless they are opposite, give a result of that norm.

    Args:
        t: how far to go, from the first adapter at 0 to the second at 1
    """
    if inner.shape[-1] != 2:
        raise InputError(f"slerp: goes between two adapters, not {inner.shape[-1]}; give two, or use another method")
    if not 0.0 <= t <= 1.0:
        raise InputError(f"slerp: t={t:g} must be between 0 and 1")
    norms = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # [g, 2]
    both = norms.prod(1)
    cosine = torch.where(both > 0, inner[:, 0, 1] / both, 1.0).clamp(-1.0, 1.0)
    angle = cosine.arccos()
    shares = torch.tensor([1.0 - t, t], dtype=torch.float64)
    straight = (cosine.abs() > STRAIGHT)[:, None]
    return torch.where(straight, shares, (shares * angle[:, None]).sin() / angle.sin()[:, None])
