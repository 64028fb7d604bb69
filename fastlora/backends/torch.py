"""Every op in batched PyTorch: for machines without compiled kernels, and for devices that none were written for.

Sums are float64 where the device has it. Where it has not, Gram blocks are sums of exact float32 products
(:mod:`fastlora.backends.torch_products`) and small matrices are solved on the host. Accuracy is that of the other
backends; bits may depend on the batch and on the number of threads, as those of torch's products do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import tiles_of_files, torch_chain, torch_differences, torch_tiles
from fastlora.backends.torch_products import has_float64, inner
from fastlora.ops.coefficients import fill
from fastlora.ops.dispatch import Kernel, always
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import BlockPlace, CombineJob, GramJob, WriteProblem
from fastlora.reference.eigh import largest_entry_sign
from fastlora.reference.gram import mask_columns, symmetric
from fastlora.reference.tucker import tucker
from fastlora.runtime.system import write_all_at

STACK_BYTES = 64 * 2**20  # of float64 factors that are multiplied in one call
TILE_COLUMNS = 1024  # of the stacked factors of `similarity`


def unavailable() -> str | None:
    """``None``: torch is always there."""
    return None


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device."""
    return torch.float64 if has_float64(device) else torch.float32


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


def gram_pass(jobs: Sequence[GramJob], product: Callable[[Tensor, Tensor], Tensor] = inner) -> None:
    """Blocks of all jobs; neighbours of equal shapes are multiplied in one call. ``product``: of rows, ``x yᵀ``."""
    for _, run in itertools.groupby(jobs, key=_kind):
        same = list(run)
        # Batched products of narrow matrices are slower than single ones on a CPU.
        on_host = all(x.is_cpu for x in same[0].factors)
        room = 1 if on_host else max(1, STACK_BYTES // max(1, 8 * sum(x.numel() for x in same[0].factors)))
        for first in range(0, len(same), room):
            _gram_stack(same[first : first + room], same[0].blocks, product)


def _kind(job: GramJob) -> tuple[Any, ...]:
    return (*((x.shape, x.dtype, x.device) for x in job.factors), job.rows, id(job.blocks))


def _gram_stack(jobs: list[GramJob], blocks: Sequence[BlockPlace], product: Callable[[Tensor, Tensor], Tensor]) -> None:
    used = {i for i, _, _ in blocks} | {j for _, j, _ in blocks}
    stacks = {i: _stacked([job.factors[i] for job in jobs]) for i in used}
    if not jobs[0].rows:
        stacks = {i: x.mT for i, x in stacks.items()}
    for block in blocks:
        i, j, _ = block
        products = product(stacks[i], stacks[j])
        products = symmetric(products) if i == j else products
        for job, found in zip(jobs, products, strict=True):
            job.block(block).copy_(found)


def _stacked(factors: list[Tensor]) -> Tensor:
    """``[jobs, …]`` as the factors lie, converted once."""
    stack = factors[0][None] if len(factors) == 1 else torch.stack(factors)
    return stack.to(wide(stack.device))


def _combine(factors: Tensor, coefficients: Tensor, ranks: Tensor | None, rows: bool) -> Tensor:
    dtype = torch.float64 if factors.dtype == torch.float64 else torch.float32
    x = mask_columns(factors.mT if rows else factors, ranks).to(wide(factors.device))  # [..., k, n, r]
    c = (coefficients.mT if rows else coefficients).to(x.dtype)  # [..., k, r, q]
    *batch, k, n, r = x.shape
    q = c.shape[-1]
    side = x.transpose(-3, -2).reshape((*batch, n, k * r)) @ c.reshape((*batch, k * r, q))
    return (side.mT if rows else side).to(dtype).contiguous()


def combine_pass(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    """All outputs of all jobs, each factor of a job converted and multiplied once."""
    for j, job in enumerate(jobs):
        results = _combined(job)
        for o, (output, result) in enumerate(zip(job.outputs, results, strict=True)):
            if output.file < 0:
                continue
            if output.check and not bool(result.isfinite().all()):
                return WriteProblem(j, o, None)
            if (errno := _write(output.file, result, output.offset)) is not None:
                return WriteProblem(j, o, errno)
    return None


def _combined(job: CombineJob) -> list[Tensor]:
    """What every output holds: stored matrices as they are, sums as columns ``[n, q]`` of the side, rounded once."""
    totals: dict[int, Tensor] = {}
    by_factor: dict[int, list[tuple[int, Tensor | None, int, float]]] = {}
    for o, output in enumerate(job.outputs):
        if output.out is not None and output.file >= 0:
            continue
        n, q = output.shape[::-1] if job.rows else output.shape
        device = job.factors[0].device if job.factors else torch.device("cpu")
        totals[o] = torch.zeros(n, q, dtype=wide(device), device=device)
        for factor, coefficient, at, scale in output.terms:
            by_factor.setdefault(factor, []).append((o, coefficient, at, scale))
    for factor, terms in by_factor.items():
        x = (job.factors[factor].mT if job.rows else job.factors[factor]).to(wide(job.factors[factor].device))
        given = [(c.mT if job.rows else c).to(x) for _, c, _, _ in terms if c is not None]
        widths = [c.shape[1] for c in given]
        parts = iter(torch.split(x @ torch.cat(given, 1), widths, 1) if given else ())
        for o, coefficient, at, scale in terms:
            part = x if coefficient is None else next(parts)
            totals[o][:, at : at + part.shape[1]].add_(part, alpha=scale)
    results = []
    for o, output in enumerate(job.outputs):
        if o not in totals:
            assert output.out is not None
            results.append(output.out)
            continue
        total = totals.pop(o)
        side = total.mT if job.rows else total
        results.append(side.to(output.dtype) if output.out is None else output.out.copy_(side))
    return results


def _write(file: int, tensor: Tensor, offset: int) -> int | None:
    """The errno of what went wrong, or ``None``."""
    try:
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        write_all_at(file, memoryview(raw), offset)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno
    return None


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, bad = _solvable(a.tril())
    if not a.numel():
        return a.new_zeros(a.shape[:-1]), a.new_zeros(a.shape).mT, bad.int()
    values, vectors = torch.linalg.eigh(x)
    vectors = vectors * largest_entry_sign(vectors, -2)
    values, vectors = _given_back(values, bad[..., None], a), _given_back(vectors, bad[..., None, None], a)
    return values, vectors.mT.contiguous().mT, bad.int().to(a.device)


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, bad = _solvable(a)
    if not a.numel():
        *batch, p, q = a.shape
        m = min(p, q)
        return (
            a.new_zeros(*batch, m, p).mT, a.new_zeros(*batch, m), a.new_zeros(*batch, m, q), bad.int().to(a.device),
        )  # fmt: skip
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    sign = largest_entry_sign(vh, -1)  # [..., m, 1]
    u, vh = (_given_back(t, bad[..., None, None], a) for t in (u * sign.mT, vh * sign))
    return u.mT.contiguous().mT, _given_back(s, bad[..., None], a), vh.contiguous(), bad.int().to(a.device)


def _solvable(a: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices in float64, zeros in place of those that hold NaN or Inf, and which these are."""
    x = a.to(_small(a.device)).double()
    bad = ~x.isfinite().all(-1).all(-1)
    return torch.where(bad[..., None, None], 0.0, x), bad


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
        U, R = ((x[:, band].mT @ x[:, later]).to(device).double() for x in (left, right))
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


KERNELS: Mapping[str, Kernel] = {
    "gram": Kernel(_gram, always),
    "eigh": Kernel(_eigh, always),
    "svd": Kernel(_svd, always),
    "chain": Kernel(torch_chain.chain, always),
    "combine": Kernel(_combine, always),
    "coefficients": Kernel(fill, always),
    "finite": Kernel(_finite, always),
    "gram_pass": Kernel(gram_pass, always),
    "combine_pass": Kernel(combine_pass, always),
    "merge_select": Kernel(torch_tiles.select, always),
    "merge_count_varied": Kernel(torch_tiles.count_varied, always),
    "merge_row_masks": Kernel(torch_tiles.row_masks, always),
    "merge_tiles": Kernel(torch_tiles.merge, always),
    "similarity": Kernel(_similarity, always),
    "tucker": Kernel(tucker, always),
    "difference_products": Kernel(torch_differences.products, always),
    "add_products": Kernel(functools.partial(tiles_of_files.add_products, formula=tiles_of_files.plain), always),
}
