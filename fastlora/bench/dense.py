"""Decomposing one module in factor space, and as the paper does on dense matrices."""

from __future__ import annotations

import functools
import time
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench import answers
from fastlora.bench.contest import OURS, Contest, Task, require
from fastlora.bench.opponents import dense_projection, dense_unique, shared_part
from fastlora.bench.passes import TAU, unique_factors
from fastlora.bench.timing import Contender, Seconds, thread_counts
from fastlora.bench.workloads import Workload, make_pool
from fastlora.engine.buffers import ResultRoom
from fastlora.engine.materialise import materialise

PAPER = "the paper's dense algorithm"
ONCE = f"{PAPER}, run once"
PARTS = f"{PAPER}, from its parts"
PARTS_ALONE = f"{PARTS} on one thread"
ADAPTERS, RANK = 8, 16
POOL = 32  # modules of a pool whose share of the time one module takes


def squares(width: int, modules: int, adapters: int, dtype: torch.dtype = torch.float32) -> Workload:
    """Rank-16 adapters of some square modules."""
    return Workload({f"dense{i}": (width, width) for i in range(modules)}, adapters, RANK, dtype)


def _what(width: int) -> str:
    return f"decompose one {width}×{width} module, {ADAPTERS} adapters of rank {RANK}"


def dense() -> list[Contest]:
    """The contest of one small module against the paper's formulas on dense matrices."""
    return [Contest(_what(1024), (PAPER,), _prepare_dense)]


def paper() -> list[Contest]:
    """The same module alone, and as its share of a pool: what a decomposition of a model comes to."""
    return [
        Contest(f"{_what(4096)} in bfloat16", (PARTS_ALONE, PARTS), partial(_prepare_parts, 1)),
        Contest(
            f"{_what(4096)} in bfloat16, as a share of {POOL}", (PARTS_ALONE, PARTS), partial(_prepare_parts, POOL)
        ),
    ]


def paper_whole() -> list[Contest]:
    """The contest of one large module against the paper's formulas on dense matrices, timed once."""
    return [Contest(_what(4096), (ONCE,), _prepare_whole)]


def _prepare_dense() -> Task:
    workload = squares(1024, 1, ADAPTERS)
    pool = make_pool(workload)
    deltas = [a.delta(pool.modules[0]) for a in pool.adapters]
    _require_unique(pool, dense_unique(deltas, TAU))
    contenders = {
        OURS: Contender(partial(unique_factors, pool), thread_counts()),
        PAPER: Contender(partial(dense_unique, deltas, TAU), thread_counts()),
    }
    return Task(contenders, 2 * workload.bytes)


def _checked_pool(modules: int, dtype: torch.dtype) -> Pool:
    """Our unique factors of the first module are right."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    pool = make_pool(squares(4096, 1, ADAPTERS, dtype))
    for ours, right in zip(unique_factors(pool), answers.unique_parts(pool, TAU), strict=True):
        for a, b in zip(ours, right, strict=False):
            require("unique B", a, b, tolerance)
    return pool if modules == 1 else make_pool(squares(4096, modules, ADAPTERS, dtype))


def _prepare_parts(modules: int) -> Task:
    pool = _checked_pool(modules, torch.bfloat16)
    room = ResultRoom()

    def ours() -> Seconds:
        start = time.perf_counter()
        unique_factors(pool, room)
        return Seconds((time.perf_counter() - start) / modules)

    contenders = {
        OURS: Contender(ours, thread_counts()),
        PARTS_ALONE: Contender(_by_parts, (1,), rounds=1),
        PARTS: Contender(_by_parts, thread_counts()[-1:], rounds=1),
    }
    note = (
        f"{PARTS}: one SVD projection, one product of projections and the eigenvectors of "
        f"the whole product were timed, once each, and counted {ADAPTERS}, {ADAPTERS - 1} and 1 times; the rest, which "
        "is cheaper, was left out"
    )
    return Task(contenders, 2 * squares(4096, 1, ADAPTERS, torch.bfloat16).bytes, note=note)


def _prepare_whole() -> Task:
    pool = _checked_pool(1, torch.float32)
    contenders = {
        OURS: Contender(partial(unique_factors, pool), thread_counts()),
        ONCE: Contender(partial(_whole, pool), thread_counts()[-1:], rounds=1),
    }
    return Task(contenders, 2 * squares(4096, 1, ADAPTERS).bytes)


def _whole(pool: Pool) -> Seconds:
    deltas = [a.delta(pool.modules[0]) for a in pool.adapters]
    start = time.perf_counter()
    unique = dense_unique(deltas, TAU)
    elapsed = time.perf_counter() - start
    _require_unique(pool, unique)
    return Seconds(elapsed)


def _by_parts() -> Seconds:
    """On the number of threads in use; the same for every pool, so it is timed once."""
    return _seconds_by_parts(torch.get_num_threads())


@functools.cache
def _seconds_by_parts(_threads: int) -> Seconds:
    """Every projection but the first is made from its factor, which is not timed."""
    pool = make_pool(squares(4096, 1, ADAPTERS, torch.bfloat16))
    (module,) = pool.modules
    delta = pool.adapters[0].delta(module)
    start = time.perf_counter()
    first = dense_projection(delta)
    projecting = time.perf_counter() - start
    bases = [torch.linalg.qr(B.float())[0] for a in pool.adapters if (B := a.updates[module].B.stored) is not None]
    require("projection", first, bases[0] @ bases[0].mT, 1e-4)
    product = first
    for basis in bases[1:-1]:
        product = (product @ basis) @ basis.mT
    last = bases[-1] @ bases[-1].mT
    start = time.perf_counter()
    product = product @ last
    multiplying = time.perf_counter() - start
    start = time.perf_counter()
    Z = shared_part(product, TAU)
    finding = time.perf_counter() - start
    _require_unique(pool, [delta - Z @ (Z.mT @ delta)])
    return Seconds(ADAPTERS * projecting + (ADAPTERS - 1) * multiplying + finding)


def _require_unique(pool: Pool, dense: list[Tensor]) -> None:
    """The unique parts of the first adapters, on their first 256 rows."""
    parts = fl.decompose(pool, threshold=TAU)
    updates = [parts.unique_of(n).updates[pool.modules[0]].baked() for n in pool.names[: len(dense)]]
    for (B, A), delta in zip(materialise(updates, torch.float32), dense, strict=True):
        require("unique ΔW", B[:256] @ A, delta[:256], 1e-4)
