"""Every op in batched PyTorch: for machines without compiled kernels, and for devices that none were written for.

Sums are float64 where the device has it. Where it has not, Gram blocks are sums of exact float32 products
(:mod:`fastlora.backends.torch_products`), and what needs float64 is computed on the host
(:mod:`fastlora.backends.torch_host`). Accuracy is that of the other backends; bits may depend on the batch and on the
number of threads, as those of torch's products do.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.backends import tiles_of_files, torch_chain, torch_combine, torch_differences, torch_gram, torch_tiles
from fastlora.backends.torch_host import float64_of_host
from fastlora.backends.torch_products import inner
from fastlora.core.float64 import has_float64
from fastlora.ops.coefficients import fill
from fastlora.ops.dispatch import Kernel, always
from fastlora.ops.gram import blocks_of
from fastlora.reference.eigh import largest_entry_sign
from fastlora.reference.gram import mask_columns, symmetric
from fastlora.reference.tucker import tucker

TILE_COLUMNS = 1024  # of the stacked factors of `similarity`
BLOCK = 1024  # rows whose products are summed in float32 there


def unavailable() -> str | None:
    """``None``: torch is always there."""
    return None


def _gram(factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> Tensor:
    x = factors.mT if rows else factors
    x = mask_columns(x, ranks).mT  # [..., k, r, n]
    *batch, k, r, n = x.shape
    out = torch.zeros((*batch, k, k, r, r), dtype=torch.float64, device=_small(factors.device))
    if blocks in ("full", "pairs"):
        stack = x.reshape((*batch, k * r, n))
        every = inner(stack, stack).reshape((*batch, k, r, k, r)).transpose(-3, -2)
        for i, j in blocks_of("pairs", k):
            out[..., i, j, :, :] = symmetric(every[..., i, j, :, :]) if i == j else every[..., i, j, :, :]
            if blocks == "full" and i != j:
                out[..., j, i, :, :] = every[..., i, j, :, :].mT
        return out
    first, second = zip(*blocks_of(blocks, k), strict=True) if k else ((), ())
    for i, j in zip(first, second, strict=True):
        product = inner(x[..., i, :, :], x[..., j, :, :])
        out[..., i, j, :, :] = symmetric(product) if i == j else product
    return out


def _small(device: torch.device) -> torch.device:
    """Where small matrices in float64 are: on the device if it has float64, else on the host."""
    return device if has_float64(device) else torch.device("cpu")


def _combine(factors: Tensor, coefficients: Tensor, ranks: Tensor | None, rows: bool) -> Tensor:
    dtype = torch.float64 if factors.dtype == torch.float64 else torch.float32
    x = mask_columns(factors.mT if rows else factors, ranks).double()  # [..., k, n, r]
    c = (coefficients.mT if rows else coefficients).to(x.dtype)  # [..., k, r, q]
    *batch, k, n, r = x.shape
    q = c.shape[-1]
    side = x.transpose(-3, -2).reshape((*batch, n, k * r)) @ c.reshape((*batch, k * r, q))
    return (side.mT if rows else side).to(dtype).contiguous()


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, size, bad = _solvable(a.tril())
    if not a.numel():
        return a.new_zeros(a.shape[:-1]), a.new_zeros(a.shape).mT, bad.int()
    values, vectors = torch.linalg.eigh(x)
    vectors = vectors * largest_entry_sign(vectors, -2)
    values = values * size
    values, vectors = _given_back(values, bad[..., None], a), _given_back(vectors, bad[..., None, None], a)
    return values, vectors.mT.contiguous().mT, bad.int().to(a.device)


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, size, bad = _solvable(a)
    if not a.numel():
        *batch, p, q = a.shape
        m = min(p, q)
        return (
            a.new_zeros(*batch, m, p).mT, a.new_zeros(*batch, m), a.new_zeros(*batch, m, q), bad.int().to(a.device),
        )  # fmt: skip
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    sign = largest_entry_sign(vh, -1)  # [..., m, 1]
    u, vh = (_given_back(t, bad[..., None, None], a) for t in (u * sign.mT, vh * sign))
    return u.mT.contiguous().mT, _given_back(s * size, bad[..., None], a), vh.contiguous(), bad.int().to(a.device)


def _solvable(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices in float64, with zeros in place of those that hold NaN or Inf; which these are. Squares of the
    entries may be beyond the range, so they are divided by a power of two, ``[..., 1]``: LAPACK does so inexactly."""
    x = a.to(_small(a.device)).double()
    bad = ~x.isfinite().all(-1).all(-1)
    x = torch.where(bad[..., None, None], 0.0, x)
    _, exponent = x.abs().flatten(-2).amax(-1, keepdim=True).frexp() if x.numel() else x.new_zeros(()).frexp()
    exponent = exponent.clamp(-1000, 1000).long()
    size, inverse = (((1023 + e) << 52).view(torch.float64) for e in (exponent, -exponent))
    return x * inverse[..., None], size, bad


def _given_back(x: Tensor, bad: Tensor, like: Tensor) -> Tensor:
    return torch.where(bad, torch.nan, x).to(like)


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _similarity(left: Tensor, right: Tensor, starts: Tensor, kept: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Both products of a band of updates with all later ones; what a pair gives is summed by its columns."""
    k, edges = len(kept), starts.tolist()
    device = _small(left.device)
    owner = torch.repeat_interleave(torch.arange(k), starts.diff()).to(device)
    counts = torch.arange(len(owner), device=device) - starts.to(device)[owner] < kept.to(device)[owner]
    inner_sums, shared = (torch.zeros(k, k, dtype=torch.float64, device=device) for _ in range(2))
    first = 0
    while first < k:
        last = first + 1
        while last < k and edges[last + 1] - edges[first] <= TILE_COLUMNS:
            last += 1
        band, later = slice(edges[first], edges[last]), slice(edges[first], edges[-1])
        U, R = (_blocked(x[:, band], x[:, later], device) for x in (left, right))
        mask = counts[band, None] & counts[None, later]
        for out, terms in ((inner_sums, U * R), (shared, torch.where(mask, U.square(), 0.0))):
            by_column = torch.zeros(last - first, terms.shape[1], dtype=torch.float64, device=device)
            by_column.index_add_(0, owner[band] - first, terms)
            out[first:last].index_add_(1, owner[later], by_column)
        first = last
    pairs = torch.ones(k, k, dtype=torch.bool, device=device).triu()
    if split:
        pairs[split:], pairs[:, :split] = False, False
    for out in (inner_sums, shared):
        half = torch.where(pairs, out, 0.0)
        out.copy_(half + half.triu(1).mT)
    return inner_sums, shared


def _blocked(x: Tensor, y: Tensor, device: torch.device) -> Tensor:
    """``xᵀ y``: products in float32, their sums over blocks of rows in float64."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=device)
    for some, others in zip(torch.split(x, BLOCK), torch.split(y, BLOCK), strict=True):
        total += (some.mT @ others).to(device)
    return total


_add_products = functools.partial(tiles_of_files.add_products, formula=tiles_of_files.plain)


def kernels(sums: torch.dtype = torch.float64) -> dict[str, Kernel]:
    """All ops. ``sums``: what both passes sum products of less than float64 in, on a CPU. With float32 they are faster
    and less exact, as what a careful user would write: the benches hold the compiled kernels against that."""
    return {
        **_OPS,
        "gram_pass": Kernel(functools.partial(torch_gram.gram_pass, sums=sums), always),
        "combine_pass": Kernel(functools.partial(torch_combine.combine_pass, sums=sums), always),
    }


_OPS: Mapping[str, Kernel] = {
    "gram": Kernel(_gram, always),
    "eigh": Kernel(_eigh, always),
    "svd": Kernel(_svd, always),
    "chain": Kernel(float64_of_host(torch_chain.chain), always),
    "combine": Kernel(float64_of_host(_combine), always),
    "coefficients": Kernel(float64_of_host(fill), always),
    "finite": Kernel(_finite, always),
    "merge_select": Kernel(float64_of_host(torch_tiles.select), always),
    "merge_count_varied": Kernel(float64_of_host(torch_tiles.count_varied), always),
    "merge_row_masks": Kernel(float64_of_host(torch_tiles.row_masks), always),
    "merge_tiles": Kernel(float64_of_host(torch_tiles.merge), always),
    "similarity": Kernel(_similarity, always),
    "tucker": Kernel(float64_of_host(tucker), always),
    "difference_products": Kernel(float64_of_host(torch_differences.products), always),
    "add_products": Kernel(float64_of_host(_add_products), always),
}

KERNELS: Mapping[str, Kernel] = kernels()
