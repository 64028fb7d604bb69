"""The two streaming passes over the factors of a whole pool, and the decomposition that is made of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench import answers, counts
from fastlora.bench.contest import OURS, Contest, Task, require
from fastlora.bench.opponents import KERNELS, PLAIN, in_plain_torch
from fastlora.bench.timing import Contender, thread_counts
from fastlora.bench.workloads import pool_of
from fastlora.core.updates import Update
from fastlora.engine.buffers import ResultRoom
from fastlora.engine.materialise import materialise_groups
from fastlora.ops.dispatch import resolve
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import BlockPlace, CombineJob, CombineOutput, CombineTerm, GramJob

TAU = 0.85
BLOCKS = "plain torch"
COPY = "a copy of as many bytes"
CHECKED = 7  # modules whose answer is compared


def gram(workload: str) -> list[Contest]:
    """The contest of a workload's gram pass against plain torch, which sums in float32."""
    return [Contest(f"gram pass, {workload}", (BLOCKS,), partial(_prepare_gram, workload))]


def _prepare_gram(workload: str) -> Task:
    """The blocks that a decomposition needs: neighbours of the chain on the B side, the diagonal on the A side."""
    pool = pool_of(workload)
    jobs: list[GramJob] = []
    places_by_kind: dict[tuple[str, int, int], list[BlockPlace]] = {}
    moved = operations = 0
    for side, kind in (("B", "chain"), ("A", "diagonal")):
        rows = side == "A"
        for factors in counts.stored(pool, side):
            ranks = [x.shape[0 if rows else 1] for x in factors]
            k, r = len(factors), max(ranks)
            pairs = blocks_of(kind, k)
            block_places = places_by_kind.setdefault((kind, k, r), [(i, j, (i * k + j) * r * r) for i, j in pairs])
            jobs.append(GramJob(factors, block_places, rows, torch.zeros(k, k, r, r, dtype=torch.float64), r))
            moved += sum(x.nbytes for x in factors)
            operations += counts.gram_operations(factors[0].shape[1 if rows else 0], ranks, pairs)

    run, plain = (partial(kernel.launch, jobs) for kernel in (resolve("gram_pass", jobs), KERNELS["gram_pass"]))
    for launch in (plain, run):
        launch()
        for job in (jobs[0], jobs[-1]):
            x = [(f if job.rows else f.mT).double() for f in job.factors]
            for block in job.blocks:
                i, j, _ = block
                scale = float(x[i].norm(dim=1).max() * x[j].norm(dim=1).max())
                require("gram", job.block(block), x[i] @ x[j].mT, 1e-5, scale)
            job.out.zero_()
    contenders = {OURS: Contender(run, thread_counts()), BLOCKS: Contender(plain, thread_counts())}
    return Task(contenders, moved, {torch.float64: operations})  # whatever is stored


def combine(workload: str) -> list[Contest]:
    """The contests of a workload's combine pass, one a side, against a copy of as many bytes."""
    return [
        Contest(f"combine pass, {side} side, {workload}", (COPY,), partial(_prepare_combine, workload, side))
        for side in ("B", "A")
    ]


def _prepare_combine(workload: str, side: str) -> Task:
    """Shapes of a decomposition: every unique factor and the shared one on the B side, the shared one on the A side."""
    generator = torch.Generator().manual_seed(1)

    def coefficient(r: int, q: int) -> Tensor:
        return torch.randn(r, q, generator=generator, dtype=torch.float64)

    rows = side == "A"
    jobs: list[CombineJob] = []
    results: list[list[tuple[Tensor, list[CombineTerm]]]] = []
    moved = 0
    for inputs in counts.stored(pool_of(workload), side):
        ranks = [x.shape[0 if rows else 1] for x in inputs]
        wanted: list[tuple[Tensor, list[CombineTerm]]] = []
        if rows:
            wanted.append((inputs[0], [(i, coefficient(ranks[0], r), 0, 1.0) for i, r in enumerate(ranks)]))
        else:
            for i, (x, r) in enumerate(zip(inputs, ranks, strict=True)):
                wanted.append((x, [(i, None, 0, 1.0), (0, coefficient(ranks[0], r), 0, 1.0)]))
            wanted.append((inputs[0], [(0, coefficient(ranks[0], ranks[0]), 0, 1.0)]))
        made = [(torch.empty_like(like), terms) for like, terms in wanted]
        results.append(made)
        jobs.append(CombineJob(inputs, [CombineOutput.into(out, terms) for out, terms in made], rows))
        moved += sum(x.nbytes for x in inputs) + sum(out.nbytes for out, _ in made)
    run = partial(resolve("combine_pass", jobs).launch, jobs)
    run()
    factors = [f.double() for f in jobs[0].factors]
    for out, terms in results[0]:
        expected = torch.zeros(out.shape, dtype=torch.float64)
        for i, c, _, _ in terms:
            expected += factors[i] if c is None else c @ factors[i] if rows else factors[i] @ c
        require("combine", out, expected, 2 * torch.finfo(out.dtype).eps if out.dtype.itemsize == 2 else 1e-5)
    source = torch.ones(moved // 2, dtype=torch.uint8)
    copy = partial(torch.empty_like(source).copy_, source)
    contenders = {OURS: Contender(run, thread_counts()), COPY: Contender(copy, thread_counts())}
    return Task(contenders, moved)


def unique_factors(pool: Pool, room: ResultRoom | None = None) -> list[list[Tensor]]:
    """Every unique ``B`` and the shared factors, module by module: what a decomposition has to compute.

    ``room``: where results go, as when they are saved; memory of their own by default.
    """
    parts = fl.decompose(pool, threshold=TAU)
    adapters = [*(parts.unique_of(n) for n in pool.names), parts.shared]
    updates = [a.updates for a in adapters]
    groups: list[list[Update]] = [[own[m] for own in updates if m in own] for m in pool.modules]
    return [[B for B, _ in pairs] for pairs in materialise_groups(groups, pool.adapters[0].dtype, room)]


def decompose(workload: str) -> list[Contest]:
    """The contest of a whole decomposition in memory against plain torch in factor space."""
    return [Contest(f"decompose in memory, {workload}", (PLAIN,), partial(_prepare_decompose, workload))]


def _prepare_decompose(workload: str) -> Task:
    pool = pool_of(workload, CHECKED)
    tolerance = 1e-4 if pool.adapters[0].dtype == torch.float32 else 2e-2
    right = answers.unique_parts(pool, TAU)
    for contender in (unique_factors, in_plain_torch(unique_factors)):
        for found, expected in zip(contender(pool), right, strict=True):
            for a, b in zip(found, expected, strict=False):
                require("unique B", a, b, tolerance)
    pool = pool_of(workload)
    contenders = {
        OURS: Contender(partial(unique_factors, pool, ResultRoom()), thread_counts()),
        PLAIN: Contender(partial(in_plain_torch(unique_factors), pool, ResultRoom()), thread_counts()),
    }
    return Task(contenders, *counts.decomposition(pool, fl.decompose(pool, threshold=TAU).shared))
