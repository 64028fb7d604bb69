"""The Karcher mean of the directions of the updates, in every module by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.merging.forms import weights as form
from fastlora.merging.forms.shares import shares


@form.method(
    summary="Karcher mean of the directions of the ΔWᵢ, at their mean norm Σωᵢ‖ΔWᵢ‖, ω = w/Σw",
    source="mergekit's `karcher`, with the base at 0; arXiv 2603.04972",
    cost="Gram",
)
def karcher(inner: Tensor, weights: Tensor, *, iterations: int = 10, tolerance: float = 1e-5) -> Tensor:
    """``(Σ_i ω_i ‖ΔW_i‖) û``, where ``û`` minimises ``Σ_i ω_i θ_i²``, ``θ_i`` its angle to ``ΔW_i``; ``ω = w/Σw``.

    From ``û ∝ Σ ω_i v_i``, ``v_i = ΔW_i/‖ΔW_i‖``, every step goes along ``t = Σ ω_i (θ_i/sin θ_i)(v_i − cos θ_i û)``:
    ``û ← cos‖t‖ û + sin‖t‖ t/‖t‖``. All of it are combinations of the ``v_i``, so ``inner [g, k, k]``,
    ``⟨ΔW_i, ΔW_j⟩``, and ``weights [k]`` are enough: → ``c [g, k]``, ``O(k²)`` operations a step.

    One adapter, and copies of one, stay as they are. For more than two adapters this does not depend on their order, as
    a chain of `slerp` would. An update that is zero, or lacks the module, has no direction, and counts in the mean
    norm. Directions opposite to ``û`` pull nowhere.

    Args:
        iterations: steps at the most
        tolerance: length of a step, and sine of an angle, below which nothing moves
    """
    if iterations < 0 or not tolerance > 0:
        raise InputError(f"karcher: iterations={iterations} must be at least 0, tolerance={tolerance:g} above 0")
    part = shares("karcher", weights)
    norms = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # [g, k]
    inverse = torch.where(norms > 0, 1.0 / norms, 0.0)
    cosines = inner * inverse[:, :, None] * inverse[:, None]  # ⟨v_i, v_j⟩
    own = torch.where(norms > 0, part, 0.0)
    own = own / _or_one(own.sum(1, keepdim=True))
    along = _start(own, cosines, tolerance)  # û = Σ along_i v_i
    for _ in range(iterations):
        dots = torch.einsum("gij,gj->gi", cosines, along).clamp(-1.0, 1.0)
        angles = dots.arccos()
        pull = torch.where((norms > 0) & (angles.sin() > tolerance), own * angles / _or_one(angles.sin()), 0.0)
        step = pull - (pull * dots).sum(1, keepdim=True) * along
        length = _length(step, cosines)
        moves = length >= tolerance
        if not bool(moves.any()):
            break
        moved = length.cos() * along + (length.sin() / _or_one(length)) * step
        moved = moved / _or_one(_length(moved, cosines))
        along = torch.where(moves, moved, along)
    return (part * norms).sum(1, keepdim=True) * along * inverse


def _start(own: Tensor, cosines: Tensor, tolerance: float) -> Tensor:
    """The normalised mean, or where it has no direction, the first one there is: ``[g, k]``."""
    length = _length(own, cosines)
    first = torch.zeros_like(own).scatter(1, (own != 0).int().argmax(1, keepdim=True), 1.0)
    return torch.where(length < tolerance, first, own / _or_one(length))


def _length(along: Tensor, cosines: Tensor) -> Tensor:
    """``‖Σ along_i v_i‖``: ``[g, 1]``."""
    return torch.einsum("gi,gij,gj->g", along, cosines, along).clamp(min=0).sqrt()[:, None]


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values != 0, values, 1.0)
