"""The chain of :func:`fastlora.ops.chain` for a batch of modules at once: masks in place of slices of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora.ops.chain import Chain, results
from fastlora.reference.chain import LEAST_MEAN, arithmetic_noise, balance

PADDING = -2.0  # below every eigenvalue of a product of projections


def chain(
    left: Tensor, right: Tensor, floor: Tensor | None, threshold: float, kind: str, rtol: float, rank: int,
    energy: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``(basis, values, shared, kept, sigma, info)`` of all modules ``[...]``."""
    *batch, k, _, r, _ = left.shape
    count = math.prod(batch)
    if not left.numel():
        return tuple(results(left, kind))
    g, a = left.reshape(count, k, k, r, r), right.reshape(count, k, r, r)
    floors = left.new_zeros(count, k) if floor is None else floor.reshape(count, k)
    upper = torch.ones(k, k, dtype=torch.bool, device=g.device).triu()[:, :, None, None]
    good = (g.isfinite() | ~upper).flatten(1).all(1) & a.isfinite().flatten(1).all(1)
    place = good[:, None, None, None]
    # Only i <= j is read: the rest may hold anything.
    g, a = torch.where(upper & place[..., None], g, 0.0), torch.where(place, a, 0.0)
    t, sigma, kept = whiten(g.diagonal(dim1=1, dim2=2).movedim(-1, 1), a, floors, rtol, rank, energy)
    basis, values, shared = (_mean if kind == "mean" else _product)(g, t, kept, threshold, kind)
    sigma = torch.where(good[:, None, None], sigma, torch.nan)
    found = Chain(basis.contiguous(), values, shared, kept, sigma.contiguous(), (~good).int())
    return tuple(x.reshape((*batch, *x.shape[1:])) for x in found)


def whiten(g: Tensor, a: Tensor, floor: Tensor, rtol: float, rank: int, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """``T [..., r, r]`` with zeros in place of columns that are not kept, all ``σ [..., r]`` descending and how many
    are kept ``[...]``: MATH (3)."""
    powers = balance(a.diagonal(dim1=-2, dim2=-1))
    values, vectors = torch.linalg.eigh(a / powers[..., :, None] / powers[..., None, :])
    least = values[..., -1:] * a.shape[-1] * 2 * torch.finfo(a.dtype).eps
    root = powers[..., :, None] * (vectors * torch.where(values > least, values, 0.0).sqrt()[..., None, :])
    floor = torch.maximum(floor, arithmetic_noise(g, a))[..., None]
    squares, vectors = torch.linalg.eigh(root.mT @ g @ root)
    sigma, vectors = squares.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
    above = (sigma > torch.maximum(rtol * sigma[..., :1], floor)) & (sigma[..., :1] > 0)
    kept = above.sum(-1)
    if rank:
        kept = kept.clamp(max=rank)
    if energy < 1:
        place = torch.arange(sigma.shape[-1], device=sigma.device)
        share = torch.where(place < kept[..., None], sigma.square(), 0.0).cumsum(-1)
        total = (above * sigma.square()).sum(-1, keepdim=True)
        short = (share < energy * total) & (place < kept[..., None])
        kept = torch.minimum(kept, short.sum(-1) + 1)
    used = torch.arange(sigma.shape[-1], device=sigma.device) < kept[..., None]
    return (root @ vectors) * torch.where(used, 1.0 / sigma, 0.0)[..., None, :], sigma, kept


def _overlap(g: Tensor, t: Tensor, i: int, j: int) -> Tensor:
    """``U_iᵀU_j [modules, r, r]``, MATH (2)."""
    block = g[:, i, j] if i <= j else g[:, j, i].mT
    product: Tensor = t[:, i].mT @ block @ t[:, j]
    return product


def _product(g: Tensor, t: Tensor, kept: Tensor, threshold: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    count, k, r, _ = t.shape
    used = torch.arange(r, device=t.device) < kept[:, :1]
    basis = t.new_zeros(count, k, r, r)
    if k == 1:  # the whitening alone
        basis[:, 0] = t[:, 0]  # zero beyond those that are kept
        return basis, used.to(torch.complex128), kept[:, 0]
    c = torch.diag_embed(used.to(t.dtype))
    for i in range(k - 1):
        c = c @ _overlap(g, t, i, i + 1)
    m = c @ c.mT if kind == "palindrome" else c @ _overlap(g, t, k - 1, 0)
    values, vectors = torch.linalg.eig(m + torch.diag_embed(torch.where(used, 0.0, PADDING)))
    order = values.real.argsort(descending=True, stable=True)
    values = torch.where(used, values.gather(1, order), 0.0)
    vectors = vectors.gather(2, order[:, None].expand_as(vectors))
    shared = ((values.real > threshold) & used).sum(1)
    taken = (torch.arange(r, device=t.device) < shared[:, None])[:, None]
    vectors = torch.where(taken, vectors, 0.0)
    directions = torch.linalg.svd(torch.cat([vectors.real, vectors.imag], 2), full_matrices=False)[0]
    basis[:, 0] = torch.where(taken, t[:, 0] @ directions, 0.0)
    return basis, values, shared


def _mean(g: Tensor, t: Tensor, kept: Tensor, threshold: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    count, k, r, _ = t.shape
    rows = [torch.cat([_overlap(g, t, i, j) for j in range(k)], 2) for i in range(k)]
    values, vectors = torch.linalg.eigh(torch.cat(rows, 1) / k)
    values, vectors = values.flip(-1), vectors.flip(-1)
    taken = values > max(threshold, LEAST_MEAN)
    coefficients = vectors * torch.where(taken, 1.0 / (k * values).sqrt(), 0.0)[:, None]
    basis = t @ coefficients.reshape(count, k, r, k * r)
    present = torch.arange(k * r, device=t.device) < kept.sum(1, keepdim=True)
    return basis, torch.where(present, values, 0.0).to(torch.complex128), taken.sum(1)
