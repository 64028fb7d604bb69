"""``tucker``: the way up to subspaces that several small matrices have most of together."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.ops import dispatch


def tucker(
    left: Tensor, right: Tensor, U: Tensor, V: Tensor, *, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Climbs ``f(U, V) = Σ_i ‖Uᵀ M_i V‖²``, ``M_i = L_i R_iᵀ``, of many modules: Tucker-2 by conjugate gradients.

    On the Grassmann manifolds of ``U`` and ``V`` together (Edelman, Arias, Smith 1998)::

        ∇_U = (I − UUᵀ) Σ M_i V S_iᵀ,  ∇_V = (I − VVᵀ) Σ M_iᵀ U S_i,  S_i = Uᵀ M_i V
        D   = ∇ + β (I − UUᵀ) D_before,  β = max(0, ⟨∇, ∇ − ∇_before⟩ / ‖∇_before‖²)
        U   = (U + t D) orthonormal,  t = −f'/f'' along the way, a quarter as long while f would fall

    Args:
        left, right: float64 ``[g, k, r, n]``, ``[g, k, r, m]``: the ``L_iᵀ`` and ``R_iᵀ``, finite, and scaled so that
            ``Σ‖M_i‖²`` is 1 at the most.
        U, V: float64 ``[g, n, c]``, ``[g, m, c]``, orthonormal: where to start. ``c ≤ n, m``.
        iterations: steps at the most.
        tolerance: a module ends when a step changes ``(1 − f)^½`` by less, or nothing can be gained but rounding.

    Returns:
        ``U``, ``V`` at the end, orthonormal to a few 1e-15, and int64 ``steps [g]``. ``f`` never falls. The bits of a
        module depend on it, the instruction set and the backend alone.

    Raises:
        TypeError, ValueError: dtype or shape.

    Cost: ``8·k·r·(n + m)·c`` operations a step and module, and ``O(k·r·c²)``; no matrix ``n×m``.
    """
    for name, x, dims in (("left", left, 4), ("right", right, 4), ("U", U, 3), ("V", V, 3)):
        if x.dtype != torch.float64:
            raise TypeError(f"tucker: {name} must be float64, got {x.dtype}")
        if x.dim() != dims:
            raise ValueError(f"tucker: {name} must have {dims} dimensions, got {list(x.shape)}")
    g, k, r, n = left.shape
    m, c = right.shape[3], U.shape[2]
    for name, x, shape in (("right", right, (g, k, r, m)), ("U", U, (g, n, c)), ("V", V, (g, m, c))):
        if tuple(x.shape) != shape:
            raise ValueError(f"tucker: {name} must be {list(shape)}, got {list(x.shape)}")
    if c > min(n, m):
        raise ValueError(f"tucker: {c} columns of U and V are more than n={n} or m={m}")
    if 0 not in (g, k, r, c):
        found: tuple[Tensor, Tensor, Tensor] = dispatch.run("tucker", left, right, U, V, max(iterations, 0), tolerance)
        return found
    return U.clone(), V.clone(), torch.zeros(g, dtype=torch.int64, device=U.device)
