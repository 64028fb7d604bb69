"""Both passes over ragged lists of factors in torch.

On a CPU slabs of the long side are converted once, into memory that stays in cache, and multiplied there; jobs are
shared among threads, each of which computes alone. On a device neighbours of equal shapes are stacked, so that few
kernels are launched.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlora.backends.torch_products import inner
from fastlora.core.float64 import has_float64
from fastlora.ops.passes import BlockPlace, CombineJob, CombineOutput, GramJob, WriteProblem
from fastlora.reference.gram import symmetric
from fastlora.runtime.system import write_all_at
from fastlora.runtime.threads import in_threads, one_thread

STACK_BYTES = 64 * 2**20  # of float64 factors that are multiplied in one call on a device
SLAB_BYTES = 2**19  # of what is converted at once on a CPU
HALVES = (torch.float16, torch.bfloat16)
SMALLEST, LARGEST = 1e-20, 1e20  # coefficients that float32 sums are trusted with
WORTH = 2**23  # elements of factors for every thread: with fewer, waiting for each other costs more than it brings

Work = TypeVar("Work")
Found = TypeVar("Found")


class _Memory:
    """Memory of one thread, used again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, length: int, rows: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[count, length]`` that lies as the factors of a side do."""
        held = self._held.get(name)
        if held is None or held.numel() < count * length or held.dtype != dtype or held.device != device:
            held = self._held[name] = torch.empty(count * length, dtype=dtype, device=device)
        x = held[: count * length]
        return x.view(count, length) if rows else x.view(length, count).mT

    def side_by_side(self, name: str, factors: Sequence[Tensor], rows: bool) -> Tensor:
        """``[Σ r, n]``, as they are stored."""
        first = factors[0]
        if len(factors) == 1:
            return first if rows else first.mT
        if any(x.dtype != first.dtype for x in factors):
            x = torch.cat(tuple(factors), 0 if rows else 1)
            return x if rows else x.mT
        count = sum(x.shape[0 if rows else 1] for x in factors)
        x = self.rows(name, count, first.shape[1 if rows else 0], rows, first.dtype, first.device)
        torch.cat(tuple(factors), 0 if rows else 1, out=x if rows else x.mT)
        return x


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
    _shared(lambda item, memory: item[0].multiply(item[1], memory), items, [g.elements for g, _ in items])
    for grams in on_host:
        grams.give()


def combine_pass(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    """All outputs of all jobs, each factor of a job converted and multiplied once."""

    def write(j: int, memory: _Memory) -> WriteProblem | None:
        for o, (output, result) in enumerate(zip(jobs[j].outputs, _combined(jobs[j], memory), strict=True)):
            if output.file < 0:
                continue
            if output.check and not bool(result.isfinite().all()):
                return WriteProblem(j, o, None)
            if (errno := _write(output.file, result, output.offset)) is not None:
                return WriteProblem(j, o, errno)
        return None

    sizes = [sum(x.numel() for x in job.factors if x.is_cpu) for job in jobs]
    problems = _shared(write, range(len(jobs)), sizes)
    return next((problem for problem in problems if problem is not None), None)


def _on_host(x: Tensor) -> bool:
    return x.is_cpu and has_float64(x.device)


def _shared(work: Callable[[Work, _Memory], Found], items: Sequence[Work], sizes: Sequence[int]) -> list[Found]:
    """The work of all items, neighbours on one of as many threads as are worth it; each has one thread of torch."""
    ends = list(itertools.accumulate(sizes, initial=0))
    threads = min(torch.get_num_threads(), max(1, ends[-1] // WORTH))
    cuts = [bisect.bisect_left(ends, ends[-1] * t / threads) for t in range(threads)] + [len(items)]

    def run(part: range) -> list[Found]:
        memory = _Memory()
        with torch.no_grad():  # it holds in one thread
            return [work(items[i], memory) for i in part]

    with one_thread():
        parts = in_threads(run, [range(a, b) for a, b in itertools.pairwise(cuts)], threads)
    return [found for part in parts for found in part]


def _places(widths: Sequence[int]) -> list[slice]:
    """Of things side by side."""
    ends = itertools.accumulate(widths)
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _length(n: int, width: int) -> int:
    """How many of the ``n`` numbers of each of ``width`` columns are a slab."""
    return max(1, min(n, max(256, SLAB_BYTES // max(1, 8 * width))))


# Gram blocks


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
        """Both factors ``[number, …]`` of the products, for rows ``x [rows, n]``."""
        sides = []
        for rows, step in zip((self.left, self.right), self.steps, strict=True):
            size = rows.stop - rows.start
            sides.append(
                x[rows.start : rows.stop + (self.number - 1) * step].unfold(0, size, step)
            )  # [number, n, size]
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
        self.length = _length(self.n, sum(self.ranks))
        room = SLAB_BYTES // max(1, 8 * sum(self.ranks) * self.length)
        self.many = max(1, room) if self.length == self.n else 1
        self.elements = min(self.many, len(jobs)) * sum(self.ranks) * self.n
        self.products = _products(jobs[0].blocks, _places(self.ranks))
        if self.many == 1:
            self.products = _batches(self.products)
        self.sums = [torch.zeros(len(jobs), p.number, *_size(p), dtype=torch.float64) for p in self.products]

    def multiply(self, first: int, memory: _Memory) -> None:
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


# Results


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


def _combined(job: CombineJob, memory: _Memory) -> list[Tensor]:
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


def _fill(job: CombineJob, outputs: list[CombineOutput], made: list[Tensor], memory: _Memory) -> None:
    rows, (rank, long) = job.rows, (0, 1) if job.rows else (1, 0)
    n, into = made[0].shape[long], _places([x.shape[rank] for x in made])
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
    length = _length(n, into[-1].stop) if device.type == "cpu" else n
    ranks = [job.factors[i].shape[rank] for i in plan.used]
    at = dict(zip(plan.used, _places(ranks), strict=True))
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
