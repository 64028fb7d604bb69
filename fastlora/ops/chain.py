"""From Gram blocks to shared directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops.op import Op, require_dims

_NUMPY_DTYPES = {
    torch.float64: np.float64,
    torch.complex128: np.complex128,
    torch.int64: np.int64,
    torch.int32: np.int32,
}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
CHAINS = ("product", "palindrome", "mean")


class Chain(NamedTuple):
    """What :func:`chain` returns; ``w = k·r`` for ``mean``, else ``r``."""

    basis: Tensor
    """float64 ``[..., k, r, w]``: ``Z = Σ_i B_i basis_i``; columns from ``shared`` on are zero."""
    values: Tensor
    """complex128 ``[..., w]``: eigenvalues, descending by real part."""
    shared: Tensor
    """int64 ``[...]``: how many eigenvalues have a real part above the threshold."""
    kept: Tensor
    """int64 ``[..., k]``: directions of each adapter that took part."""
    sigma: Tensor
    """float64 ``[..., k, r]``: singular values of each ``B_i A_i`` (unscaled), descending."""
    info: Tensor
    """int32 ``[...]``: 0 done, 1 a block holds NaN or Inf, 2 not converged."""


def width(kind: str, k: int, r: int) -> int:
    """Columns of the basis of a chain of ``k`` adapters of rank ``r``: the most directions that it can give."""
    return k * r if kind == "mean" else r


def _check(
    left: Tensor,
    right: Tensor,
    floor: Tensor | None,
    threshold: float,
    kind: str,
    rtol: float,
    rank: int,
    energy: float,
) -> None:
    require_dims("chain", "left", left, "[..., k, k, r, r]", 4)
    *batch, k, k2, r, r2 = left.shape
    if k != k2 or r != r2:
        raise ValueError(f"chain: `left` must be [..., k, k, r, r], got {list(left.shape)}")
    if list(right.shape) != [*batch, k, r, r]:
        raise ValueError(f"chain: `right` must be {[*batch, k, r, r]}, got {list(right.shape)}")
    if floor is not None and list(floor.shape) != [*batch, k]:
        raise ValueError(f"chain: `floor` must be {[*batch, k]}, got {list(floor.shape)}")
    for name, tensor in (("left", left), ("right", right), ("floor", floor)):
        if tensor is not None and tensor.dtype != torch.float64:
            raise TypeError(f"chain: `{name}` must be float64 (as `gram` returns it), got {tensor.dtype}")
    check_cuts(threshold, kind, rtol, rank, energy)


def _host_memory(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """``torch.empty`` by way of NumPy, which takes half the time."""
    return torch.from_numpy(np.empty(shape, _NUMPY_DTYPES[dtype]))


def results(left: Tensor, kind: str) -> Chain:
    """Memory for what a kernel gives, which writes every element; zeros where there is nothing to compute from.

    The prepared form of ``chain``, which CUDA has, takes it as its last argument: the workspace is allocated and the
    arguments are packed once, and every ``run()`` fills the results from what the Gram blocks hold by then.
    """
    *batch, k, _, r, _ = left.shape
    w = width(kind, k, r)
    new: Any = left.new_empty if left.numel() else left.new_zeros
    if left.is_cpu and left.numel():
        new = _host_memory
    return Chain(
        basis=new((*batch, k, r, w)),
        values=new((*batch, w), dtype=torch.complex128),
        shared=new(batch, dtype=torch.int64),
        kept=new((*batch, k), dtype=torch.int64),
        sigma=new((*batch, k, r)),
        info=new(batch, dtype=torch.int32),
    )


def _empty(left: Tensor, right: Tensor, floor: Tensor | None, threshold: float, kind: str, *cuts: float) -> Outputs:
    basis, values, shared, kept, sigma, info = results(left, kind)
    return basis, values, shared, kept, sigma, info


def check_cuts(threshold: float, kind: str, rtol: float, rank: int, energy: float) -> None:
    """Raises :class:`InputError` for a threshold, chain name or cut that has no meaning."""
    if kind not in CHAINS:
        raise InputError(f"chain={kind!r} does not exist: use one of {', '.join(CHAINS)}")
    if not 0.0 <= threshold < 1.0:
        raise InputError(f"threshold={threshold}: must be at least 0 and below 1 (the paper uses 0.85)")
    if not 0.0 <= rtol < 1.0:
        raise InputError(f"rtol={rtol}: must be at least 0 and below 1")
    if rank < 0:
        raise InputError(f"rank={rank}: must be at least 1 (0 in `ops.chain`: no cut)")
    if not 0.0 < energy <= 1.0:
        raise InputError(f"energy={energy}: must be above 0 and at most 1 (1: no cut)")


_chain = Op(
    "chain(Tensor left, Tensor right, Tensor? floor, float threshold, str kind, float rtol, int rank, float energy)"
    " -> (Tensor basis, Tensor values, Tensor shared, Tensor kept, Tensor sigma, Tensor info)",
    _check,
    _empty,
)


def chain(
    left: Tensor,
    right: Tensor,
    *,
    threshold: float = 0.85,
    kind: str = "product",
    rtol: float = 1e-6,
    rank: int = 0,
    energy: float = 1.0,
    floor: Tensor | None = None,
) -> Chain:
    r"""Shared directions of ``k`` updates from their Gram blocks: whitening, projection chain, eigenvalue threshold.

    ``P_i`` projects on the column space of ``B_i A_i``, in factor form ``U_i = B_i T_i`` by MATH (3). The operator is
    ``P_1 P_2 … P_k`` (``kind="product"``), ``C Cᵀ`` with ``C = P_1 … P_k`` (``"palindrome"``) or ``(1/k) Σ P_i``
    (``"mean"``); its invariant subspace for eigenvalues with real part above ``threshold`` has the orthonormal basis
    ``Z = Σ_i B_i basis_i``. With ``k = 1`` it is the whitening alone: ``basis`` is ``T_1``.

    Args:
        left: float64 ``[..., k, k, r, r]``: Gram blocks of the projected side, padded with zeros. Only ``i <= j`` are
            read, and of those what the chain needs (:func:`fastlora.ops.gram` with ``blocks="chain"``; ``mean``:
            ``"pairs"``).
        right: float64 ``[..., k, r, r]``: diagonal Gram blocks of the other side.
        threshold: ``τ``, in ``[0, 1)``.
        rtol: directions with ``σ <= rtol·σ_max`` are noise and do not take part; likewise ``σ <= floor [..., k]``.
        rank, energy: keep at most ``rank`` directions (0: all), or the fewest with the share ``energy`` of ``Σσ²``.

    Returns:
        :class:`Chain`. A module whose blocks are not finite has ``info = 1`` and shares nothing.

    Raises:
        TypeError, ValueError: dtype or shape; InputError: a parameter outside its range.

    Cost: about 20·k·r³ operations a module (``mean``: 9·(k·r)³).
    """
    basis, values, shared, kept, sigma, info = _chain(left, right, floor, threshold, kind, rtol, rank, energy)
    return Chain(basis, values, shared, kept, sigma, info)
