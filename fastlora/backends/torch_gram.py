"""Gram passes over ragged lists of factors in torch.

On a CPU slabs of the long side are converted once, into memory that stays in cache, and multiplied there; jobs are
shared among threads, each of which computes alone. On a device neighbours of equal shapes are stacked, so that few
kernels are launched.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends.torch_products import inner
from fastlora.backends.torch_slabs import SLAB_BYTES, Memory, places_of, shared, slab_length
from fastlora.core.float64 import has_float64
from fastlora.ops.passes import BlockPlace, GramJob
from fastlora.reference.gram import symmetric

STACK_BYTES = 64 * 2**20  # of float64 factors that are multiplied in one call on a device


def gram_pass(jobs: Sequence[GramJob]) -> None:
    """Blocks of all jobs; neighbours of equal shapes together."""
    on_host: list[_Grams] = []
    for _, run in itertools.groupby(jobs, key=_kind):
        same = list(run)
        if all(_on_host(x) for x in same[0].factors):
            on_host.append(_Grams(same))
            continue
        room = max(1, STACK_BYTES // max(1, 8 * sum(x.numel() for x in same[0].factors)))
        for first in range(0, len(same), room):
            _gram_stack(same[first : first + room])
    items = [(grams, first) for grams in on_host for first in range(0, len(grams.jobs) * (grams.n > 0), grams.many)]
    shared(lambda item, memory: item[0].multiply(item[1], memory), items, [g.elements for g, _ in items])
    for grams in on_host:
        grams.give()


def _on_host(x: Tensor) -> bool:
    return x.is_cpu and has_float64(x.device)


def _kind(job: GramJob) -> tuple[Any, ...]:
    return (*((x.shape, x.dtype, x.device) for x in job.factors), job.rows, id(job.blocks))


class _Products(NamedTuple):
    """``number`` products of the stack's rows: ``left`` and ``right`` of the first, how far those of the next are from
    them, and the blocks with their place ``(product, columns)``."""

    left: slice
    right: slice
    blocks: list[tuple[BlockPlace, int, slice]]
    number: int = 1
    steps: tuple[int, int] = (1, 1)

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors of the products, ``[number, size, n]`` and ``[number, n, size]``, for rows ``x [rows, n]``."""
        sides = []
        for rows, step in zip((self.left, self.right), self.steps, strict=True):
            last = rows.stop + (self.number - 1) * step
            sides.append(x[rows.start : last].unfold(0, rows.stop - rows.start, step))
        return sides[0].mT, sides[1]


def _products(blocks: Sequence[BlockPlace], at: Sequence[slice]) -> list[_Products]:
    """A product for every factor and the neighbours in the stack that it meets."""
    found: list[_Products] = []
    for block in sorted(blocks):
        i, j, _ = block
        last = found[-1] if found else None
        if last is None or last.left != at[i] or last.right.stop != at[j].start:
            found.append(_Products(at[i], at[j], [(block, 0, slice(0, at[j].stop - at[j].start))]))
            continue
        start = last.right.start
        last.blocks.append((block, 0, slice(at[j].start - start, at[j].stop - start)))
        found[-1] = last._replace(right=slice(start, at[j].stop))
    return found


def _batches(products: list[_Products]) -> list[_Products]:
    """Products of the same size whose places are equally far apart are one."""
    found: list[_Products] = []
    for p in products:
        last = found[-1] if found else None
        if last is None or _size(last) != _size(p):
            found.append(p)
            continue
        away = p.left.start - last.left.start, p.right.start - last.right.start
        steps = away if last.number == 1 else last.steps
        if min(steps) < 1 or away != (last.number * steps[0], last.number * steps[1]):
            found.append(p)
            continue
        own = [(block, last.number, columns) for block, _, columns in p.blocks]
        found[-1] = last._replace(blocks=[*last.blocks, *own], number=last.number + 1, steps=steps)
    return found


def _size(p: _Products) -> tuple[int, int]:
    return p.left.stop - p.left.start, p.right.stop - p.right.start


class _Grams:
    """Jobs of one kind on a CPU: several in a slab where they are short, else of one after the other."""

    def __init__(self, jobs: list[GramJob]) -> None:
        self.jobs = jobs
        shapes = [x.shape if jobs[0].rows else x.mT.shape for x in jobs[0].factors]
        self.ranks, self.n = [s[0] for s in shapes], max((s[1] for s in shapes), default=0)
        self.length = slab_length(self.n, sum(self.ranks))
        room = SLAB_BYTES // max(1, 8 * sum(self.ranks) * self.length)
        self.many = max(1, room) if self.length == self.n else 1
        self.elements = min(self.many, len(jobs)) * sum(self.ranks) * self.n
        self.products = _products(jobs[0].blocks, places_of(self.ranks))
        if self.many == 1:
            self.products = _batches(self.products)
        self.sums = [torch.zeros(len(jobs), p.number, *_size(p), dtype=torch.float64) for p in self.products]

    def multiply(self, first: int, memory: Memory) -> None:
        """The sums of :attr:`many` jobs."""
        mine, n, length, rows = self.jobs[first : first + self.many], self.n, self.length, self.jobs[0].rows
        stored = memory.side_by_side("stored", [x for job in mine for x in job.factors], rows)
        slab = memory.rows("slab", len(stored), length, rows, torch.float64, stored.device)
        single = self.many == 1
        totals = [total[first] if single else total[first : first + self.many, 0] for total in self.sums]
        for start, piece in zip(range(0, n, length), torch.split(stored, length, 1), strict=True):
            if start == 0 or n - start < length:
                x = slab[:, : n - start]
                by_job = x.view(len(mine), -1, x.shape[1])
                pairs = [p.of(x) if single else (by_job[:, p.left], by_job[:, p.right].mT) for p in self.products]
            x.copy_(piece)
            for total, pair in zip(totals, pairs, strict=True):
                total.baddbmm_(*pair)

    def give(self) -> None:
        """Every block to its place."""
        for p, total in zip(self.products, self.sums, strict=True):
            by_columns: dict[tuple[bool, int, int], list[tuple[BlockPlace, int]]] = {}
            for block, place, columns in p.blocks:
                by_columns.setdefault((block[0] == block[1], columns.start, columns.stop), []).append((block, place))
            for (diagonal, start, stop), same in by_columns.items():
                found = total[..., start:stop]
                found = symmetric(found) if diagonal else found
                for job, own in zip(self.jobs, found.unbind(), strict=True):
                    each = own.unbind()
                    for block, place in same:
                        job.block(block).copy_(each[place])


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
