"""Combine passes over ragged lists of factors in torch: on a CPU slab after slab, as Gram passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends.torch_combine_stacked import fill
from fastlora.backends.torch_slabs import Memory, Uses, shared, slab_length, slabs
from fastlora.core.float64 import has_float64
from fastlora.ops.passes import CombineJob, CombineOutput, WriteProblem
from fastlora.runtime.system import write_all_at

HALVES = (torch.float16, torch.bfloat16)
SMALLEST, LARGEST = 1e-20, 1e20  # coefficients that float32 sums are trusted with


def combine_pass(jobs: Sequence[CombineJob], sums: torch.dtype = torch.float64) -> WriteProblem | None:
    """All outputs of all jobs, each factor of a job converted once. ``sums``: what terms of less than float64 are
    summed in on a CPU; those of half precision are summed in float32 where no coefficient is extreme."""

    def write(j: int, memory: Memory) -> WriteProblem | None:
        for o, (output, result) in enumerate(zip(jobs[j].outputs, _combined(jobs[j], sums, memory), strict=True)):
            if output.file < 0:
                continue
            if output.check and not bool(result.isfinite().all()):
                return WriteProblem(j, o, None)
            if (errno := _write(output.file, result, output.offset)) is not None:
                return WriteProblem(j, o, errno)
        return None

    sizes = [[x.numel() for x in job.factors if x.is_cpu] for job in jobs]
    problems = shared(write, range(len(jobs)), sizes)
    return next((problem for problem in problems if problem is not None), None)


def _combined(job: CombineJob, sums: torch.dtype, memory: Memory) -> list[Tensor]:
    """What every output holds: stored matrices as they are, sums rounded once."""
    results: list[Tensor] = []
    summed: list[int] = []
    for o, output in enumerate(job.outputs):
        if output.out is None:
            device = job.factors[0].device if job.factors else torch.device("cpu")
            results.append(torch.empty(output.shape, dtype=output.dtype, device=device))
        else:
            results.append(output.out)
        if (output.out is None or output.file < 0) and results[o].numel():
            summed.append(o)
    if summed:
        _fill(job, [job.outputs[o] for o in summed], [results[o] for o in summed], sums, memory)
    return results


def _fill(job: CombineJob, outputs: list[CombineOutput], made: list[Tensor], sums: torch.dtype, memory: Memory) -> None:
    device = made[0].device
    if device.type == "cpu":
        _fill_on_host(job, outputs, made, _dtype_of(job, outputs, made, sums), memory)
    elif has_float64(device):  # asking whether float32 is enough would take longer
        fill(job, outputs, made, torch.float64)
    elif _dtype_of(job, outputs, made, torch.float64) == torch.float32:
        fill(job, outputs, made, torch.float32)
    else:
        copies = [torch.empty(x.shape, dtype=x.dtype) for x in made]
        host = replace(job, factors=[x.to("cpu") for x in job.factors])
        _fill_on_host(host, outputs, copies, torch.float64, memory)
        for x, copy in zip(made, copies, strict=True):
            x.copy_(copy)


def _fill_on_host(
    job: CombineJob, outputs: list[CombineOutput], made: list[Tensor], dtype: torch.dtype, memory: Memory
) -> None:
    short, long = (0, 1) if job.rows else (1, 0)
    widths = [x.shape[short] for x in job.factors]
    plans = [_Plan(output, widths, job.rows, dtype) for output in outputs]
    uses = Uses([[step.factor] if step.multiplied else [] for plan in plans for step in plan.steps], widths)
    length = slab_length(made[0].shape[long], uses.columns + max(x.shape[short] for x in made), dtype)
    pieces = [slabs(x, length, long) for x in job.factors]
    results = [slabs(x, length, long) for x in made]
    for p in range(len(results[0])):
        x, use = dict[int, Tensor](), 0
        for plan, own in zip(plans, results, strict=True):
            result = own[p]
            total = result if result.dtype == dtype else memory.take(result.shape, dtype)
            if plan.zero:
                total.zero_()
            for step in plan.steps:
                i = step.factor
                stored = pieces[i][p]
                if step.multiplied and i not in x:
                    x[i] = memory.converted(stored, dtype)
                place = total if plan.whole else total[step.place] if job.rows else total[:, step.place]
                step.run(place, x.get(i, stored), job.rows)
                if uses.last.get(i) == use and (done := x.pop(i)) is not stored:
                    memory.give(done)
                use += 1
            if total is not result:
                result.copy_(total)
                memory.give(total)


class _Step(NamedTuple):
    """A term that is put into its place, or added to what is there."""

    factor: int
    coefficient: Tensor | None
    scale: float
    place: slice
    put: bool

    @property
    def multiplied(self) -> bool:
        """Whether it computes with the factor; else it copies it."""
        return self.coefficient is not None or self.scale != 1 or not self.put

    def run(self, place: Tensor, x: Tensor, rows: bool) -> None:
        """``x`` is the factor, in the dtype of the sum if it is multiplied."""
        if self.coefficient is None:
            if not self.put:
                place.add_(x, alpha=self.scale)
            elif self.scale == 1:
                place.copy_(x)
            else:
                torch.mul(x, self.scale, out=place)
            return
        pair = (self.coefficient, x) if rows else (x, self.coefficient)
        if self.put:
            torch.mm(*pair, out=place)
        else:
            place.addmm_(*pair)


class _Plan:
    """The terms of an output in the order of their places. Places that overlap, or leave some of it out, are ``zero``
    at first; else the first term of each is put there. ``whole``: all have the same place, which is all of it."""

    def __init__(self, output: CombineOutput, widths: Sequence[int], rows: bool, dtype: torch.dtype) -> None:
        terms = []
        for factor, c, start, scale in sorted(output.terms, key=lambda term: (term[2], term[1] is not None)):
            width = widths[factor]
            if c is not None:
                width = c.shape[0 if rows else 1]
                c = (c if scale == 1 else scale * c).to(dtype)
            terms.append((factor, c, scale, (start, start + width)))
        edges = sorted({edges for *_, edges in terms})
        apart = all(one[1] <= two[0] for one, two in itertools.pairwise(edges))
        self.zero = not apart or sum(b - a for a, b in edges) != output.shape[0 if rows else 1]
        self.whole = len(edges) == 1 and not self.zero
        self.steps: list[_Step] = []
        covered = set(edges if self.zero else [])
        for factor, c, scale, place in terms:
            self.steps.append(_Step(factor, c, scale, slice(*place), place not in covered))
            covered.add(place)


def _dtype_of(
    job: CombineJob, outputs: Sequence[CombineOutput], made: Sequence[Tensor], sums: torch.dtype
) -> torch.dtype:
    """What sums are made in."""
    dtypes = {x.dtype for x in itertools.chain(job.factors, made)}
    if torch.float64 in dtypes:
        return torch.float64
    return torch.float32 if dtypes.issubset(HALVES) and _float32_is_enough(outputs, job.rows) else sums


def _float32_is_enough(outputs: Sequence[CombineOutput], rows: bool) -> bool:
    """Whether no coefficient is extreme."""
    by_width: dict[int, list[Tensor]] = {}
    for output in outputs:
        for _, c, _, scale in output.terms:
            if c is None:
                by_width.setdefault(1, []).append(torch.tensor([[scale]], dtype=torch.float64))
            elif c.numel():
                c = (c if rows else c.mT) if scale == 1 else scale * (c if rows else c.mT)
                by_width.setdefault(c.shape[1], []).append(c.cpu())
    largest = torch.cat([torch.cat(same).abs().amax(1) for same in by_width.values()] or [torch.zeros(1)])
    return bool(((largest == 0) | ((largest >= SMALLEST) & (largest <= LARGEST))).all())


def _write(file: int, tensor: Tensor, offset: int) -> int | None:
    """The errno of what went wrong, or ``None``."""
    try:
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        write_all_at(file, memoryview(raw), offset)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno
    return None
