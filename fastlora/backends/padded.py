"""The ops on padded batches as passes over ragged lists: what every backend with compiled passes does alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlora.ops.chain import results
from fastlora.ops.dispatch import Launches
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm, GramJob


def unpadded(x: Tensor, ranks: list[int] | None, rows: bool) -> list[Tensor]:
    """The ``k`` factors of one module without padding: ``x [k, n, r]`` or ``[k, r, n]``."""
    counts = [x.shape[1 if rows else 2]] * x.shape[0] if ranks is None else [max(c, 0) for c in ranks]
    return [factor[:c] if rows else factor[:, :c] for factor, c in zip(x, counts, strict=True)]


def flat(x: Tensor, batch: list[int]) -> Tensor:
    """``x`` with one batch dimension; ``-1`` would not do where a tensor has no elements."""
    return x.contiguous().reshape(math.prod(batch), *x.shape[len(batch) :])


def aligned(x: Tensor) -> Tensor:
    """The tensor without gaps, at an address that its elements may have: kernels read it by plain pointers."""
    x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def gram(
    run: Callable[[Sequence[GramJob]], object], factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool
) -> Tensor:
    """``fastlora.ops.gram`` by a gram pass."""
    *batch, k, first, second = factors.shape
    r = first if rows else second
    out = torch.zeros((*batch, k, k, r, r), dtype=torch.float64, device=factors.device)
    x = flat(factors, batch)
    counts = None if ranks is None else flat(ranks, batch).tolist()
    block_places = [(i, j, (i * k + j) * r * r) for i, j in blocks_of(blocks, k)]
    jobs = []
    for m in range(x.shape[0]):
        own_factors = unpadded(x[m], None if counts is None else counts[m], rows)
        jobs.append(GramJob(own_factors, block_places, rows, out, r, m * k * k * r * r))
    run(jobs)
    if blocks == "full":
        lower = torch.ones(k, k, dtype=torch.bool, device=out.device).tril(-1)
        out = torch.where(lower[:, :, None, None], out.transpose(-3, -4).mT, out).contiguous()
    return out


def combine(
    run: Callable[[Sequence[CombineJob]], object],
    factors: Tensor,
    coefficients: Tensor,
    ranks: Tensor | None,
    rows: bool,
) -> Tensor:
    """``fastlora.ops.combine`` by a combine pass."""
    *batch, _, first, second = factors.shape
    n, q = (second, coefficients.shape[-2]) if rows else (first, coefficients.shape[-1])
    dtype = torch.float64 if factors.dtype == torch.float64 else torch.float32
    out = torch.zeros((*batch, q, n) if rows else (*batch, n, q), dtype=dtype, device=factors.device)
    x, c, to = flat(factors, batch), flat(aligned(coefficients.double()), batch), flat(out, batch)
    counts = None if ranks is None else flat(ranks, batch).tolist()
    jobs = []
    for m in range(x.shape[0]):
        own_factors = unpadded(x[m], None if counts is None else counts[m], rows)
        terms: list[CombineTerm] = [
            (i, c[m, i, :, : f.shape[0]] if rows else c[m, i, : f.shape[1]], 0, 1.0) for i, f in enumerate(own_factors)
        ]
        jobs.append(CombineJob(own_factors, [CombineOutput.into(to[m], terms)], rows))
    run(jobs)
    return out


def chain(
    prepare: Callable[..., Launches],
    left: Tensor,
    right: Tensor,
    floor: Tensor | None,
    threshold: float,
    kind: str,
    rtol: float,
    rank: int,
    energy: float,
) -> tuple[Tensor, ...]:
    """``fastlora.ops.chain`` by its prepared form."""
    left, right = aligned(left), aligned(right)
    floor = left.new_zeros(left.shape[:-3]) if floor is None else aligned(floor)
    out = results(left, kind)
    prepare(left, right, floor, threshold, kind, rtol, rank, energy, out).run()
    return tuple(out)
