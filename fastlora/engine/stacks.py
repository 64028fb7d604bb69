"""All updates of one module side by side as ``U_i R_i``, each ``U_i`` with orthonormal columns: what all pairs of a
large pool are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora import ops
from fastlora.core.factors import Side, device_of
from fastlora.core.updates import MIN_RTOL, Update, default_rtol, factor, unscaled
from fastlora.engine.checks import check_diagonal, raise_for_info
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import GroupPart, split_to_fit
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm
from fastlora.runtime.memory import batch_bytes

STACK_BYTES = 256 * 2**20  # of the stacks of one module
ADAPTERS_OF_JOB = 32  # that are computed side by side


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


def stacked(updates: Sequence[Update], T: Tensor, C: Tensor, ranks: Sequence[int]) -> Stacked:
    """The stacks of some updates of one module: ``T``, ``C`` ``[k, r, r]`` of :class:`Frames`. Results are summed in
    float64 and rounded once."""
    starts = torch.tensor([0, *ranks]).cumsum(0)
    places = starts.tolist()
    width, where = places[-1], device_of([[u.B for u in updates], [u.A for u in updates]])
    n, m = updates[0].shape
    left, right = (torch.empty(shape, dtype=torch.float32, device=where) for shape in ((n, width), (width, m)))
    left_small, right_small = T.to(where), C.mT.contiguous().to(where)
    jobs = []
    for first in range(0, len(updates), ADAPTERS_OF_JOB):
        some = slice(first, min(first + ADAPTERS_OF_JOB, len(updates)))
        columns = slice(places[some.start], places[some.stop])
        if columns.start == columns.stop:
            continue
        jobs.append(_job(updates[some], "B", left_small[some], ranks[some], left[:, columns]))
        jobs.append(_job(updates[some], "A", right_small[some], ranks[some], right[columns]))
    run_pass("combine_pass", jobs)
    return Stacked(left, right.mT.contiguous(), starts)


def _job(updates: Sequence[Update], side: Side, small: Tensor, ranks: Sequence[int], out: Tensor) -> CombineJob:
    """What computes ``B_i T_i`` or ``C_iᵀ A_i`` of some adapters side by side; ``small [k, r, q]`` or ``[k, q, r]``. A
    pool has tens of thousands of factors, so all of them are terms of one result."""
    factors: list[Tensor] = []
    terms: list[CombineTerm] = []
    at = 0
    for update, own, q in zip(updates, small.unbind(), ranks, strict=True):
        factor = update.B if side == "B" else update.A
        if q:
            shape = (factor.rank, q) if side == "B" else (q, factor.rank)
            used = own if own.shape == shape else own[: shape[0], : shape[1]]
            stored = factor.stored
            if stored is not None:
                terms.append((len(factors), used, at, 1.0))
                factors.append(stored)
            else:
                for term in factor.applied(used).terms:
                    terms.append((len(factors), term.coefficient, at + term.at, term.scale))
                    factors.append(term.source)
        at += q
    return CombineJob(factors, [CombineOutput.into(out, terms)], side == "A")
