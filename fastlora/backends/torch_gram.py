"""Gram passes over ragged lists of factors in torch.

On a CPU slabs of a factor are converted once, and multiplied while they are in cache: one product a block, as factors
lie. Jobs are shared among threads, each of which computes alone. On a device neighbours of equal shapes are stacked, so
that few kernels are launched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.backends.torch_products import inner
from fastlora.backends.torch_slabs import Memory, Uses, shared, slab_length, slabs
from fastlora.core.float64 import has_float64
from fastlora.ops.passes import GramJob
from fastlora.reference.gram import symmetric

STACK_BYTES = 64 * 2**20  # of float64 factors that are multiplied in one call on a device


def gram_pass(jobs: Sequence[GramJob], sums: torch.dtype = torch.float64) -> None:
    """Blocks of all jobs. ``sums``: what products of less than float64 are summed in on a CPU; on a device it is
    float64."""
    on_host: dict[tuple[Any, ...], list[GramJob]] = {}
    for kind, run in itertools.groupby(jobs, key=_kind):
        same = list(run)
        if all(_on_host(x) for x in same[0].factors):
            on_host.setdefault(kind, []).extend(same)
            continue
        room = max(1, STACK_BYTES // max(1, 8 * sum(x.numel() for x in same[0].factors)))
        for first in range(0, len(same), room):
            _gram_stack(same[first : first + room])
    grams = [_Grams(same, sums) for same in on_host.values()]
    items = [(own, j) for own in grams for j in range(len(own.jobs))]
    shared(
        lambda item, memory: item[0].multiply(item[1], memory),
        items,
        [[x.numel() for x in own.jobs[j].factors] for own, j in items],
    )
    for own in grams:
        own.give()


def _on_host(x: Tensor) -> bool:
    return x.is_cpu and has_float64(x.device)


def _kind(job: GramJob) -> tuple[Any, ...]:
    return (*((x.shape, x.dtype, x.device) for x in job.factors), job.rows, id(job.blocks), job.stride)


class _Grams:
    """Jobs of one kind on a CPU."""

    def __init__(self, jobs: list[GramJob], sums: torch.dtype) -> None:
        self.jobs, first = jobs, jobs[0]
        self.axis, short = (1, 0) if first.rows else (0, 1)
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in first.factors) else sums
        ranks = [x.shape[short] for x in first.factors]
        n = max((x.shape[self.axis] for x in first.factors), default=0)
        # A factor is converted when it is met, and multiplied with those before it.
        self.order = sorted(range(len(first.blocks)), key=lambda b: max(first.blocks[b][:2]))
        self.pairs = [{*first.blocks[b][:2]} for b in self.order]
        self.uses = Uses(self.pairs, ranks)
        self.length = slab_length(n, self.uses.columns, self.dtype)
        self.by_shape: dict[tuple[int, int], list[int]] = {}
        for b, (i, j, _) in enumerate(first.blocks):
            self.by_shape.setdefault((ranks[i], ranks[j]), []).append(b)
        self.sums = [
            torch.empty(len(jobs), len(same), *shape, dtype=self.dtype) for shape, same in self.by_shape.items()
        ]
        self.places = [dict[int, Tensor]() for _ in jobs]
        for same, total in zip(self.by_shape.values(), self.sums, strict=True):
            for own, of_job in zip(self.places, total.unbind(), strict=True):
                own.update(zip(same, of_job.unbind(), strict=True))

    def multiply(self, j: int, memory: Memory) -> None:
        """The sums of one job."""
        job, sums = self.jobs[j], self.places[j]
        pieces = [slabs(x, self.length, self.axis) for x in job.factors]
        for p in range(max(map(len, pieces), default=0)):
            x: dict[int, Tensor] = {}
            for use, (b, pair) in enumerate(zip(self.order, self.pairs, strict=True)):
                for i in pair:
                    if i not in x:
                        x[i] = memory.converted(pieces[i][p], self.dtype)
                left, right = x[job.blocks[b][0]], x[job.blocks[b][1]]
                left, right = (left, right.mT) if job.rows else (left.mT, right)
                if p:
                    sums[b].addmm_(left, right)
                else:
                    torch.mm(left, right, out=sums[b])
                for i in pair:
                    if self.uses.last[i] == use and (done := x.pop(i)) is not pieces[i][p]:
                        memory.give(done)

    def give(self) -> None:
        """Every block to its place."""
        first = self.jobs[0]
        outs: dict[int, list[int]] = {}
        for place, job in enumerate(self.jobs):
            outs.setdefault(id(job.out), []).append(place)
        for (a, b), which, total in zip(self.by_shape, self.by_shape.values(), self.sums, strict=True):
            blocks = [first.blocks[w] for w in which]
            found = total.double()
            if a == b:
                diagonal = torch.tensor([i == j for i, j, _ in blocks])[:, None, None]
                found = torch.where(diagonal, symmetric(found), found)
            offsets = np.array([offset for _, _, offset in blocks])[:, None, None]
            inside = offsets + np.arange(a)[:, None] * first.stride + np.arange(b)
            numbers: Any = found.numpy()
            for places in outs.values():
                starts = np.array([self.jobs[place].start for place in places])[:, None, None, None]
                out: Any = self.jobs[places[0]].out.view(-1).numpy()
                out[starts + inside] = numbers[places]


def _gram_stack(jobs: list[GramJob]) -> None:
    """The same on a device, or without float64."""
    blocks = jobs[0].blocks
    used = {i for i, _, _ in blocks} | {j for _, j, _ in blocks}
    stacks = {i: _stacked([job.factors[i] for job in jobs]) for i in used}
    if not jobs[0].rows:
        stacks = {i: x.mT for i, x in stacks.items()}
    for block in blocks:
        i, j, _ = block
        products = inner(stacks[i], stacks[j])
        products = symmetric(products) if i == j else products
        for job, found in zip(jobs, products, strict=True):
            job.block(block).copy_(found)


def _stacked(factors: list[Tensor]) -> Tensor:
    """``[jobs, …]`` as the factors lie, converted once."""
    stack = factors[0][None] if len(factors) == 1 else torch.stack(factors)
    return stack.double() if has_float64(stack.device) else stack.float()
