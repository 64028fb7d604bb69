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
from fastlora.runtime.memory import batch_bytes, release

STACK_BYTES = 256 * 2**20  # of the stacks of one module
EXACT_BYTES = 2 * 2**20  # of a piece of a stack in float64, before it is rounded


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
    release(sources(u for row in updates for u in row))
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
    """The stacks of some updates of one module: ``T``, ``C`` ``[k, r, r]`` of :class:`Frames`."""
    starts = torch.tensor([0, *ranks]).cumsum(0)
    width, where = int(starts[-1]), sources(updates)[0].device
    n, m = updates[0].shape
    left, right = (torch.empty(length, width, dtype=torch.float32, device=where) for length in (n, m))
    for stack, small, side in ((left, T, "B"), (right, C, "A")):
        for piece, columns in _pieces(ranks, starts, len(stack)):
            wanted = [(updates[i], small[i][: updates[i].rank, : ranks[i]]) for i in piece if ranks[i]]
            stack[:, columns] = _exact(wanted, side, len(stack), where)  # type: ignore[arg-type]
    return Stacked(left, right, starts)


def _pieces(ranks: Sequence[int], starts: Tensor, length: int) -> Iterator[tuple[range, slice]]:
    """Neighbours whose columns in float64 fit in memory, and their columns."""
    for piece in split_to_fit([8 * rank * length for rank in ranks], EXACT_BYTES):
        yield piece, slice(int(starts[piece[0]]), int(starts[piece[-1] + 1]))


def _exact(wanted: Sequence[tuple[Update, Tensor]], side: Side, length: int, where: torch.device) -> Tensor:
    """``B_i T_i`` or ``(C_iᵀ A_i)ᵀ`` side by side, computed in float64: ``[length, Σq]``."""
    width = sum(small.shape[1] for _, small in wanted)
    shape = (length, width) if side == "B" else (width, length)
    out = torch.zeros(shape, dtype=torch.float64, device=where)
    jobs, at = [], 0
    for update, small in wanted:
        q = small.shape[1]
        place = out[:, at : at + q] if side == "B" else out[at : at + q]
        jobs.append(WantedFactor(factor(update, side).times(small), torch.float64, place))
        at += q
    if jobs:
        run_pass("combine_pass", [combine_job(jobs)])
    return out if side == "B" else out.mT
