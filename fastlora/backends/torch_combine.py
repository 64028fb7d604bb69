"""Combine passes over ragged lists of factors in torch: on a CPU by slabs, as Gram passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.backends.torch_slabs import Memory, places_of, shared, slab_length
from fastlora.core.float64 import has_float64
from fastlora.ops.passes import CombineJob, CombineOutput, WriteProblem
from fastlora.runtime.system import write_all_at

HALVES = (torch.float16, torch.bfloat16)
SMALLEST, LARGEST = 1e-20, 1e20  # coefficients that float32 sums are trusted with


def combine_pass(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    """All outputs of all jobs, each factor of a job converted and multiplied once."""

    def write(j: int, memory: Memory) -> WriteProblem | None:
        for o, (output, result) in enumerate(zip(jobs[j].outputs, _combined(jobs[j], memory), strict=True)):
            if output.file < 0:
                continue
            if output.check and not bool(result.isfinite().all()):
                return WriteProblem(j, o, None)
            if (errno := _write(output.file, result, output.offset)) is not None:
                return WriteProblem(j, o, errno)
        return None

    sizes = [sum(x.numel() for x in job.factors if x.is_cpu) for job in jobs]
    problems = shared(write, range(len(jobs)), sizes)
    return next((problem for problem in problems if problem is not None), None)


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


def _combined(job: CombineJob, memory: Memory) -> list[Tensor]:
    """What every output holds: stored matrices as they are, sums rounded once."""
    results: list[Tensor] = []
    summed: list[int] = []
    for o, output in enumerate(job.outputs):
        if output.out is None:
            device = job.factors[0].device if job.factors else torch.device("cpu")
            results.append(torch.empty(output.shape, dtype=output.dtype, device=device))
        else:
            results.append(output.out)
        if output.out is None or output.file < 0:
            summed.append(o)
    if any(results[o].numel() for o in summed):
        _fill(job, [job.outputs[o] for o in summed], [results[o] for o in summed], memory)
    return results


def _fill(job: CombineJob, outputs: list[CombineOutput], made: list[Tensor], memory: Memory) -> None:
    rows, (rank, long) = job.rows, (0, 1) if job.rows else (1, 0)
    n, into = made[0].shape[long], places_of([x.shape[rank] for x in made])
    plan = _Plan(outputs, into, [x.shape[rank] for x in job.factors], rows)
    device = job.factors[0].device if job.factors else made[0].device
    ask = device.type == "cpu" or not has_float64(device)  # on other devices asking takes longer
    dtype = torch.float32 if ask and _float32_is_enough(job, made, plan) else torch.float64
    if dtype == torch.float64 and not has_float64(device):
        copies = [torch.empty(x.shape, dtype=x.dtype) for x in made]
        _fill(replace(job, factors=[x.to("cpu") for x in job.factors]), outputs, copies, memory)
        for x, copy in zip(made, copies, strict=True):
            x.copy_(copy)
        return
    length = slab_length(n, into[-1].stop) if device.type == "cpu" else n
    ranks = [job.factors[i].shape[rank] for i in plan.used]
    at = dict(zip(plan.used, places_of(ranks), strict=True))
    stack = memory.rows("stack", sum(ranks), length, rows, dtype, device)
    total = memory.rows("total", into[-1].stop, length, rows, dtype, device)
    sources = [which for _, which in plan.laid] + [plan.used] * bool(plan.used)
    stored = [
        torch.split(memory.side_by_side(f"stored {i}", [job.factors[f] for f in which], rows), length, 1)
        for i, which in enumerate(sources)
    ]
    outs = [torch.split(x, length, long) for x in made]
    added = [(place, at[f], None if c is None else c.to(dtype).to(device), scale) for place, f, c, scale in plan.added]
    for i, start in enumerate(range(0, n, length)):
        if start == 0 or n - start < length:
            stack, total = stack[:, : n - start], total[:, : n - start]
            places = [total[place] for place, _ in plan.laid] + [stack] * bool(plan.used)
            sums = [total[place] if rows else total[place].mT for place in into]
            terms = [(total[place], stack[factor], c, scale) for place, factor, c, scale in added]
            zero = [total[place] for place in plan.zero]
        for x, pieces in zip(places, stored, strict=True):
            x.copy_(pieces[i])
        for x in zero:
            x.zero_()
        for result, x, c, scale in terms:
            if c is None:
                result.add_(x, alpha=scale)
            else:
                result.addmm_(c, x)
        torch._foreach_copy_([out[i] for out in outs], sums)


def _float32_is_enough(job: CombineJob, made: list[Tensor], plan: _Plan) -> bool:
    """Whether all is in half precision and no coefficient extreme."""
    if not all(x.dtype in HALVES for x in itertools.chain(job.factors, made)):
        return False
    for _, _, coefficient, scale in plan.added:
        if coefficient is not None and not coefficient.numel():
            continue
        largest = torch.tensor([abs(scale)]) if coefficient is None else coefficient.abs().amax(1)
        if not bool(((largest == 0) | ((largest >= SMALLEST) & (largest <= LARGEST))).all()):
            return False
    return True


def _write(file: int, tensor: Tensor, offset: int) -> int | None:
    """The errno of what went wrong, or ``None``."""
    try:
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        write_all_at(file, memoryview(raw), offset)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno
    return None
