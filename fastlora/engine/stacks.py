"""All updates of one module side by side as ``U_i R_i``, each ``U_i`` with orthonormal columns: what all pairs of a
large pool are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Side
from fastlora.core.updates import MIN_RTOL, Update, default_rtol, factor, sources, unscaled
from fastlora.engine.checks import check_diagonal, raise_for_info
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import GroupPart, split_to_fit
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob, CombineOutput
from fastlora.runtime.memory import batch_bytes

STACK_BYTES = 256 * 2**20  # of the stacks of one module
ADAPTERS_OF_JOB = 32  # whose columns are computed by one thread, one chunk after the other


class Frames(NamedTuple):
    """Of some modules ``g`` of one group, on the host: ``U_i = B_i T_i`` and ``R_i = C_iᵀ A_i`` up to the size ``σ_i``.

    ``T``, ``C``: float64 ``[g, k, r, r]``, columns by descending singular value, zero beyond ``ranks [g, k]``. ``kept
    [g, k]``: directions above the noise floor. ``norms [g, k]``: ``‖ΔW_i‖``. ``sizes [g, k]``: ``‖ΔW_i‖₂``, which
    ``C`` is divided by.
    """

    T: Tensor
    C: Tensor
    ranks: Tensor
    kept: Tensor
    norms: Tensor
    sizes: Tensor


class Stacked(NamedTuple):
    """Float32 ``left [n, Σq]`` of the ``U_i`` and ``right [m, Σq]`` of the ``R_iᵀ/σ_i``; ``starts [k + 1]`` of each."""

    left: Tensor
    right: Tensor
    starts: Tensor


def frames(part: GroupPart) -> Frames:
    """The frames of every adapter in every module of a part: one read of the factors."""
    updates = part.updates()
    g, k, r = len(updates), len(part.group.members), part.group.rank
    grams = GramPass()
    blocks = [grams.diagonal([[factor(u, side) for u in row] for row in updates], r) for side in ("B", "A")]
    grams.run()
    for side, block in zip(("B", "A"), blocks, strict=True):
        check_diagonal(part.names, part.modules, block, side)
    left, right = (block.reshape(g * k, r, r) for block in blocks)
    chain = ops.chain(left[:, None, None], right[:, None], threshold=0.0, rtol=MIN_RTOL)
    raise_for_info([module for module in part.modules for _ in range(k)], chain.info)
    sigma = chain.sigma.reshape(g, k, r).cpu()
    scaling = torch.tensor([[u.scaling for u in row] for row in updates], dtype=torch.float64)
    T = chain.basis.reshape(g * k, r, -1)
    C = (left @ T).reshape(g, k, r, -1).cpu() * torch.where(scaling < 0, -1.0, 1.0)[:, :, None, None]
    top = sigma[:, :, :1, None]
    C = torch.where(top > 0, C / top, 0.0)
    floor = torch.tensor([[unscaled(u.noise.floor, u) for u in row] for row in updates], dtype=torch.float64)
    rtols = torch.tensor([[default_rtol([u]) for u in row] for row in updates], dtype=torch.float64)
    above = (sigma > rtols[:, :, None] * sigma[:, :, :1]) & (sigma > floor[:, :, None])
    ranks = chain.kept.reshape(g, k).cpu() * (scaling != 0)
    kept = torch.minimum(above.sum(-1), ranks)
    sizes = scaling.abs() * sigma[:, :, 0]
    norms = scaling.abs() * sigma.norm(dim=-1)
    return Frames(T.reshape(g, k, r, -1).cpu(), C, ranks, kept, norms, sizes)


def blocks_of_adapters(ranks: Sequence[int], length: int) -> list[range]:
    """Neighbouring adapters whose stacks fit in memory, two such blocks at a time."""
    each = [4 * rank * length for rank in ranks]
    whole = batch_bytes(STACK_BYTES)
    return [range(len(ranks))] if sum(each) <= whole else split_to_fit(each, STACK_BYTES // 2)


Entry = tuple[Update, Tensor, Tensor, int, Tensor, Tensor]
"""An update, its ``T`` and ``C``, its rank ``q``, and where its columns and rows go."""


def stacked(updates: Sequence[Update], T: Tensor, C: Tensor, ranks: Sequence[int]) -> Stacked:
    """The stacks of some updates of one module: ``T``, ``C`` ``[k, r, r]`` of :class:`Frames`. Results are summed in
    float64 and rounded once."""
    starts = torch.tensor([0, *ranks]).cumsum(0)
    width, where = int(starts[-1]), sources(updates)[0].device
    n, m = updates[0].shape
    left, right = (torch.empty(shape, dtype=torch.float32, device=where) for shape in ((n, width), (width, m)))
    places = torch.split_with_sizes(left, list(ranks), 1), torch.split_with_sizes(right, list(ranks), 0)
    entries = [entry for entry in zip(updates, T.to(where), C.to(where), ranks, *places, strict=True) if entry[3]]
    if entries:
        run_pass("combine_pass", [*_jobs(entries, "B"), *_jobs(entries, "A")])
    return Stacked(left, right.mT.contiguous(), starts)


def _jobs(entries: Sequence[Entry], side: Side) -> Iterator[CombineJob]:
    """What computes ``B_i T_i`` or ``C_iᵀ A_i`` of some adapters; a job for some of them. A pool has tens of thousands
    of factors, so that those that are one stored matrix go into a job without a record of their own."""
    for first in range(0, len(entries), ADAPTERS_OF_JOB):
        factors: list[Tensor] = []
        outputs: list[CombineOutput] = []
        sums: list[WantedFactor] = []
        for update, T, C, q, left, right in entries[first : first + ADAPTERS_OF_JOB]:
            small, place, own = (T, left, update.B) if side == "B" else (C, right, update.A)
            small = small if small.shape == (own.rank, q) else small[: own.rank, :q]
            stored = own.stored
            if stored is None:
                sums.append(WantedFactor(own.times(small), torch.float32, place))
                continue
            coefficient = small if side == "B" else small.mT.contiguous()
            outputs.append(CombineOutput.into(place, [(len(factors), coefficient, 0, 1.0)]))
            factors.append(stored)
        if outputs:
            yield CombineJob(factors, outputs, side == "A")
        if sums:
            yield combine_job(sums)
