"""Shared directions from Gram blocks by MATH (1)–(6), module by module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below it, z = Σ U_i y_i/√(kλ) is the difference of nearly equal vectors: no direction, only rounding.
LEAST_MEAN = 1e-10
# Squared lengths of rows, relative to the longest, and powers below which none is balanced.
UNBALANCED, LEAST_POWER = 2.0**-16, 2.0**-400
# What rounding leaves of a singular value that is zero, in units of √(r ε) ‖B‖ ‖A‖: four times the most that was seen.
ARITHMETIC = 0.5


def chain(
    left: Tensor,
    right: Tensor,
    floor: Tensor | None,
    threshold: float,
    kind: str,
    rtol: float,
    rank: int,
    energy: float,
) -> tuple[Tensor, ...]:
    """``(basis, values, shared, kept, sigma, info)`` of :func:`fastlora.ops.chain`, one module after another."""
    *batch, k, _, r, _ = left.shape
    count = math.prod(batch)
    flat = left.reshape(count, k, k, r, r), right.reshape(count, k, r, r)
    floors = torch.zeros(count, k, dtype=torch.float64) if floor is None else floor.reshape(count, k)
    if count == 0 or r == 0:
        w = k * r if kind == "mean" else r
        shapes = [(k, r, w), (w,), (), (k,), (k, r), ()]
        dtypes = [torch.float64, torch.complex128, torch.int64, torch.int64, torch.float64, torch.int32]
        return tuple(torch.zeros((*batch, *s), dtype=d) for s, d in zip(shapes, dtypes, strict=True))
    rows = [one_module(g, a, f, threshold, kind, rtol, rank, energy) for g, a, f in zip(*flat, floors, strict=True)]
    return tuple(torch.stack(column).reshape((*batch, *column[0].shape)) for column in zip(*rows, strict=True))


def whiten(g: Tensor, a: Tensor, floor: float, rtol: float, rank: int, energy: float) -> tuple[Tensor, Tensor]:
    """``T [r, kept]`` and all ``σ`` descending, MATH (3)."""
    powers = balance(a.diagonal())
    root = powers[:, None] * semidefinite_root(a / powers[:, None] / powers)
    floor = max(floor, float(arithmetic_noise(g, a)))
    values, vectors = torch.linalg.eigh(root.mT @ g @ root)
    sigma, vectors = values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
    keep = int((sigma > max(rtol * float(sigma[0]), floor)).sum()) if float(sigma[0]) > 0 else 0
    if rank:
        keep = min(keep, rank)
    if energy < 1:
        share = sigma[:keep].square().cumsum(0)
        total = float((sigma > max(rtol * float(sigma[0]), floor)).double() @ sigma.square())
        keep = min(keep, int((share < energy * total).sum()) + 1)
    return root @ vectors[:, :keep] / sigma[:keep], sigma


def balance(squares: Tensor) -> Tensor:
    """Powers of two that bring rows of these squared lengths ``[..., r]`` within 2⁸ of the longest: a row's length may
    as well be in the other factor."""
    powers = torch.ones_like(squares)
    if not squares.numel():
        return powers
    longest = squares.amax(-1, keepdim=True)
    while True:
        short = (squares > 0) & (squares < UNBALANCED * powers.square() * longest) & (powers > LEAST_POWER)
        if not bool(short.any()):
            return powers
        powers = torch.where(short, powers * UNBALANCED**0.5, powers)


def arithmetic_noise(g: Tensor, a: Tensor) -> Tensor:
    """What the arithmetic leaves of a ``σ`` that is zero: ``½ √(r ε) ‖B‖ ‖A‖``, with rows of ``A`` brought to length
    one and their lengths to ``B``, from ``g``, ``a`` ``[..., r, r]``: ``[...]``.

    The squares of the norms are bounded by sums of rows of the Gram matrices. ``r`` counts rows that are not zero.
    """
    lengths = a.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, 0.0)
    left = (g.abs() * lengths[..., :, None] * lengths[..., None, :]).sum(-1)
    right = (a.abs() * inverse[..., :, None] * inverse[..., None, :]).sum(-1)
    epsilon = (lengths > 0).sum(-1) * torch.finfo(torch.float64).eps
    noise: Tensor = ARITHMETIC * (epsilon * left.amax(-1)).sqrt() * right.amax(-1).sqrt()
    return noise


def semidefinite_root(a: Tensor) -> Tensor:
    """``L`` with ``L Lᵀ = A`` for a positive semidefinite ``A [r, r]``; columns at rounding level are zero."""
    vectors: Tensor
    values, vectors = torch.linalg.eigh(a)
    least = values[-1] * a.shape[-1] * 2 * torch.finfo(a.dtype).eps
    return vectors * torch.where(values > least, values, 0.0).sqrt()


def one_module(
    g: Tensor, a: Tensor, floor: Tensor, threshold: float, kind: str, rtol: float, rank: int, energy: float
) -> tuple[Tensor, ...]:
    """The chain of one module: ``g [k, k, r, r]`` and ``a [k, r, r]`` are its Gram blocks, ``floor [k]``."""
    k, r = g.shape[0], g.shape[-1]
    w = k * r if kind == "mean" else r
    basis, values = torch.zeros(k, r, w, dtype=g.dtype), torch.zeros(w, dtype=torch.complex128)
    upper = torch.ones(k, k, dtype=torch.bool).triu()
    if not (g[upper].isfinite().all() and a.isfinite().all()):
        zero = torch.zeros(k, dtype=torch.int64)
        nan = torch.full((k, r), torch.nan, dtype=g.dtype)
        return basis, values, zero[0], zero, nan, torch.tensor(1, dtype=torch.int32)
    whitened = [whiten(g[i, i], a[i], float(floor[i]), rtol, rank, energy) for i in range(k)]
    t = [x for x, _ in whitened]

    def overlap(i: int, j: int) -> Tensor:  # U_iᵀU_j, MATH (2)
        return t[i].mT @ (g[i, j] if i <= j else g[j, i].mT) @ t[j]

    if kind == "mean":
        m = torch.cat([torch.cat([overlap(i, j) for j in range(k)], 1) for i in range(k)]) / k
        lam, y = torch.linalg.eigh(m)
        lam, y = lam.flip(0), y.flip(1)
        q = int((lam > max(threshold, LEAST_MEAN)).sum())
        values[: len(lam)] = lam.to(values.dtype)
        rows = torch.split(y[:, :q] / (k * lam[:q]).sqrt(), [x.shape[1] for x in t])
        for i in range(k):
            basis[i, :, :q] = t[i] @ rows[i]
    elif k == 1:
        q = t[0].shape[1]
        values[:q], basis[0, :, :q] = 1.0, t[0]
    else:
        c = torch.eye(t[0].shape[1], dtype=g.dtype)
        for i in range(k - 1):
            c = c @ overlap(i, i + 1)
        m = c @ c.mT if kind == "palindrome" else c @ overlap(k - 1, 0)
        lam_c, z = torch.linalg.eig(m)
        order = torch.argsort(lam_c.real, descending=True, stable=True)
        lam_c, z = lam_c[order], z[:, order]
        q = int((lam_c.real > threshold).sum())
        values[: len(lam_c)] = lam_c
        span = torch.cat([z[:, :q].real, z[:, :q].imag], 1)  # a real subspace of dimension q
        basis[0, :, :q] = t[0] @ torch.linalg.svd(span, full_matrices=False)[0][:, :q]
    kept = torch.tensor([x.shape[1] for x in t])
    sigma = torch.stack([s for _, s in whitened])
    return basis, values, torch.tensor(q), kept, sigma, torch.tensor(0, dtype=torch.int32)
