"""The best rank-16 approximation of a sum of two rank-16 adapters; and of what TIES makes of eight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench.contest import OURS, Contest, Task, Unavailable, require
from fastlora.bench.dense import ADAPTERS, RANK, squares
from fastlora.bench.opponents import merge_by_dense_svd, merge_by_peft, merge_by_qr, peft_model
from fastlora.bench.timing import Contender, thread_counts
from fastlora.bench.workloads import Workload, make_pool
from fastlora.engine.materialise import materialise_groups

QR = "torch QR and small SVD"
DENSE = "torch dense SVD"
PEFT = 'peft, combination_type="svd", run once'
PEFT_TIES = 'peft, combination_type="ties_svd", run once'
DENSITY = 0.2

Merge = Callable[[Pool], list[tuple[Tensor, Tensor]]]


def _what(modules: str) -> str:
    return f"svd merge of 2 × r{RANK}, {modules}"


def merge() -> list[Contest]:
    """The contests of a merge to a rank: many modules against QR of the factors, one against dense SVD."""
    many, one = squares(4096, 16, 2), squares(1024, 1, 2)
    return [
        Contest(_what("sixteen 4096×4096 modules"), (QR,), partial(_prepare, many, QR, merge_by_qr)),
        Contest(_what("one 1024×1024 module"), (DENSE,), partial(_prepare, one, DENSE, merge_by_dense_svd)),
    ]


def peft() -> list[Contest]:
    """The contest of a merge to a rank against the peft package."""
    return [Contest(_what("one 4096×4096 module"), (PEFT,), _prepare_peft)]


def peft_ties() -> list[Contest]:
    """The contest of TIES, cut to a rank, against the peft package."""
    what = f"ties merge of {ADAPTERS} × r{RANK} to r{RANK}, one 4096×4096 module"
    return [Contest(what, (PEFT_TIES,), _prepare_peft_ties)]


def by_fastlora(pool: Pool) -> list[tuple[Tensor, Tensor]]:
    """``(B [n, r], A [r, m])`` of every module of the merged pool, in float32."""
    merged = fl.merge(pool, method="svd", rank=RANK)
    return [pair for (pair,) in materialise_groups([[u.baked()] for u in merged.updates.values()], torch.float32)]


def _prepare(workload: Workload, name: str, theirs: Merge) -> Task:
    pool = make_pool(workload)
    _require_same(by_fastlora(pool), theirs(pool))
    contenders = {
        OURS: Contender(partial(by_fastlora, pool), thread_counts()),
        name: Contender(partial(theirs, pool), thread_counts()),
    }
    return Task(contenders, workload.bytes + workload.bytes // 2)


def _prepare_peft() -> Task:
    """``peft`` takes most of a minute: its one result is checked after it was timed, ours before."""
    _require_peft()
    workload = squares(4096, 1, 2)
    pool = make_pool(workload)
    ours = by_fastlora(pool)
    _require_same(ours, merge_by_qr(pool))
    model = peft_model(pool)

    def theirs() -> None:
        _require_same(ours, merge_by_peft(model, pool.names))

    contenders = {
        OURS: Contender(partial(by_fastlora, pool), thread_counts()),
        PEFT: Contender(theirs, thread_counts()[-1:], rounds=1),
    }
    return Task(contenders, workload.bytes + workload.bytes // 2)


def _prepare_peft_ties() -> Task:
    """Neither cut is unique, as the spectrum has no gap: both must hold nearly the same energy, ours by a sketch. The
    floor is that of forming all elements three times."""
    _require_peft()
    workload = squares(4096, 1, ADAPTERS)
    pool = make_pool(workload)
    model = peft_model(pool)

    def ours() -> list[tuple[Tensor, Tensor]]:
        merged = fl.merge(pool, method="ties", density=DENSITY, rank=RANK, min_energy=0.0)
        return [pair for (pair,) in materialise_groups([[u.baked()] for u in merged.updates.values()], torch.float32)]

    own = ours()

    def theirs() -> None:
        for (B, A), (Bt, At) in zip(
            own, merge_by_peft(model, pool.names, "ties_svd", RANK, density=DENSITY), strict=True
        ):
            energies = [torch.linalg.multi_dot((a, a.mT, b.mT, b)).trace() for b, a in ((B, A), (Bt, At))]
            require("energy of merged ΔW", energies[0][None], energies[1][None], 0.05)

    contenders = {
        OURS: Contender(ours, thread_counts()),
        PEFT_TIES: Contender(theirs, thread_counts()[-1:], rounds=1),
    }
    return Task(contenders, workload.bytes, operations=3 * 2 * ADAPTERS * RANK * 4096**2)


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Unavailable("merging against peft needs peft: `pip install 'fastlora[peft]'`") from None


def _require_same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    """The merged updates, on their first 256 rows."""
    for (B, A), (Bt, At) in zip(ours, theirs, strict=True):
        require("merged ΔW", B[:256] @ A, Bt[:256] @ At, 1e-4)
