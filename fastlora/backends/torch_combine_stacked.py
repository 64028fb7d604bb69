"""Outputs of a combine job on a device in torch: factors side by side, so that few kernels are launched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.ops.passes import CombineJob, CombineOutput


def fill(job: CombineJob, outputs: Sequence[CombineOutput], made: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The outputs of one job into ``made``, summed in ``dtype``."""
    rows, rank = job.rows, 0 if job.rows else 1
    into, ranks = places_of([x.shape[rank] for x in made]), [x.shape[rank] for x in job.factors]
    plan = _Plan(outputs, into, ranks, rows)
    at = dict(zip(plan.used, places_of([ranks[i] for i in plan.used]), strict=True))
    n, device = made[0].shape[1 - rank], made[0].device
    total = torch.empty((into[-1].stop, n) if rows else (n, into[-1].stop), dtype=dtype, device=device)
    total = total if rows else total.mT
    for place, which in plan.laid:
        total[place].copy_(_side_by_side([job.factors[i] for i in which], rows))
    for place in plan.zero:
        total[place].zero_()
    if plan.used:
        stack = _side_by_side([job.factors[i] for i in plan.used], rows).to(dtype)
        for place, factor, c, scale in plan.added:
            if c is None:
                total[place].add_(stack[at[factor]], alpha=scale)
            else:
                total[place].addmm_(c.to(dtype).to(device), stack[at[factor]])
    torch._foreach_copy_(list(made), [total[place] if rows else total[place].mT for place in into])


def places_of(widths: Sequence[int]) -> list[slice]:
    """Of things side by side."""
    ends = itertools.accumulate(widths)
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _side_by_side(factors: Sequence[Tensor], rows: bool) -> Tensor:
    """``[Σ r, n]``, as they are stored."""
    return torch.cat(tuple(factors), 0) if rows else torch.cat(tuple(factors), 1).mT


class _Plan:
    """How the results of a job, side by side as rows, are made of its factors: what is laid there as it is stored,
    what is zero at first, and ``(rows, factor, product, scale)`` that are added."""

    def __init__(
        self, outputs: Sequence[CombineOutput], into: Sequence[slice], ranks: Sequence[int], rows: bool
    ) -> None:
        self.laid: list[tuple[slice, list[int]]] = []
        products: dict[int, list[tuple[slice, Tensor]]] = {}
        scaled: list[tuple[slice, int, Tensor | None, float]] = []
        for output, place in zip(outputs, into, strict=True):
            free = place.start
            for factor, coefficient, offset, scale in sorted(output.terms, key=lambda term: term[2]):
                start = place.start + offset
                if coefficient is not None:
                    c = coefficient if rows else coefficient.mT
                    products.setdefault(factor, []).append(
                        (slice(start, start + len(c)), c if scale == 1 else scale * c)
                    )
                    continue
                covered = slice(start, start + ranks[factor])
                if scale == 1 and start >= free:
                    self._lay(covered, factor)
                    free = covered.stop
                else:
                    scaled.append((covered, factor, None, scale))
        self.added = [(*part, 1.0) for factor, parts in products.items() for part in _joined(factor, parts)] + scaled
        self.used = sorted({factor for _, factor, _, _ in self.added})
        edges = [0, *(edge for covered, _ in self.laid for edge in (covered.start, covered.stop)), into[-1].stop]
        self.zero = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def _lay(self, covered: slice, factor: int) -> None:
        if self.laid and self.laid[-1][0].stop == covered.start:
            before, factors = self.laid.pop()
            self.laid.append((slice(before.start, covered.stop), [*factors, factor]))
        else:
            self.laid.append((covered, [factor]))


def _joined(factor: int, parts: list[tuple[slice, Tensor]]) -> list[tuple[slice, int, Tensor]]:
    """Coefficients of a factor whose results stand side by side are one."""
    found: list[tuple[slice, int, Tensor]] = []
    parts = sorted(parts, key=lambda part: part[0].start)
    first = 0
    for i, (place, _) in enumerate(parts, 1):
        if i == len(parts) or parts[i][0].start != place.stop:
            same = [c for _, c in parts[first:i]]
            found.append(
                (slice(parts[first][0].start, place.stop), factor, same[0] if len(same) == 1 else torch.cat(same))
            )
            first = i
    return found
