"""Coefficients of the shared and unique parts of a decomposition, from Gram blocks: MATH (7)–(10).

``dispatch.run("coefficients", projected, other, basis, scaling, strength, out)`` fills ``out``:

* ``projected [g, k, k, r, r]``: Gram blocks ``X_iᵀX_j`` of the projected side, ``i <= j``; ``other [g, k, r, r]``: of
  each adapter's other side; ``basis [g, k, r, w]``: of the chain; ``scaling [g, k]``: the ``s_i``; ``strength [g, k]``:
  of the removals. All float64 and contiguous, on one device.
* Nothing is checked and nothing raised: the decomposition that prepares the launch made the tensors.
* ``dispatch.prepared("coefficients", …)`` with the same arguments packs their addresses once where a backend can
  (CUDA); every ``run()`` fills ``out`` from what the tensors hold by then, and a CUDA graph can hold it.
* Costs ``O(movers·k·r³)`` operations and one read and write of the tensors a module.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastlora.reference.coefficients import coefficients


class PartCoefficients(NamedTuple):
    """Of ``g`` modules with ``k`` adapters of rank ``r``, a basis of width ``w`` on the first ``movers`` of them."""

    H: Tensor
    """``[g, k, w, r]``: ``H_i = ZᵀX_i``."""
    norms: Tensor
    """``[g, k]``: ``‖ΔW_i‖``."""
    shared: Tensor
    """``[g, k]``: ``‖ΔW_i^shared‖``, MATH (9)."""
    removal: Tensor
    """``[g, k, movers, r, r]``: ``-strength_i basis_j H_i``, what the unique part of ``i`` adds on ``X_j``."""
    mixing: Tensor
    """``[g, k, w, r]``: ``ω_i s_i H_i``, MATH (10); zero where nothing is shared."""


def fill(
    projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: PartCoefficients
) -> None:
    """The formula, on the tensors of ``out``: what backends without a kernel of their own run."""
    values = coefficients(projected, other, basis, scaling, strength, out.removal.shape[2])
    for target, value in zip(out, values, strict=True):
        target.copy_(value)
