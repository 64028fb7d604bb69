"""The best rank-16 approximation of a sum of two rank-16 adapters, and of what TIES makes of eight; the methods that
need Gram blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench.contest import OURS, Contest, Task, Unavailable, require
from fastlora.bench.dense import ADAPTERS, RANK, squares
from fastlora.bench.opponents import (
    PLAIN,
    in_plain_torch,
    merge_by_dense_svd,
    merge_by_peft,
    merge_by_qr,
    peft_model,
)
from fastlora.bench.timing import Contender, thread_counts
from fastlora.bench.workloads import Workload, find, make_pool, pool_of
from fastlora.engine.materialise import materialise_groups

QR = "torch QR and small SVD"
DENSE = "torch dense SVD"
PEFT = 'peft, combination_type="svd", run once'
PEFT_TIES = 'peft, combination_type="ties_svd", run once'
SVD_MERGE = "our svd merge"
DENSITY = 0.2
COSTS = ("Gram", "Gram, iterated", "Gram, rows")

Merge = Callable[[Pool], list[tuple[Tensor, Tensor]]]


def _what(modules: str) -> str:
    return f"svd merge of 2 × r{RANK}, {modules}"


def merge() -> list[Contest]:
    """The contests of a merge to a rank: many modules in factor space, one against dense SVD."""
    many, one = squares(4096, 16, 2), squares(1024, 1, 2)
    factors: dict[str, Merge] = {PLAIN: in_plain_torch(by_fastlora), QR: merge_by_qr}
    return [
        Contest(_what("sixteen 4096×4096 modules"), tuple(factors), partial(_prepare, many, factors)),
        Contest(_what("one 1024×1024 module"), (DENSE,), partial(_prepare, one, {DENSE: merge_by_dense_svd})),
    ]


def peft() -> list[Contest]:
    """The contest of a merge to a rank against the peft package."""
    return [Contest(_what("one 4096×4096 module"), (PEFT,), _prepare_peft)]


def peft_ties() -> list[Contest]:
    """The contest of TIES, cut to a rank, against the peft package."""
    what = f"ties merge of {ADAPTERS} × r{RANK} to r{RANK}, one 4096×4096 module"
    return [Contest(what, (PEFT_TIES,), _prepare_peft_ties)]


def containers(workload: str) -> list[Contest]:
    """The contests of rules on elements in common bases, over a whole model."""
    return [
        Contest(f"{method} merge, {workload}", (SVD_MERGE,), partial(_prepare_container, workload, method))
        for method in ("ctm", "core")
    ]


def _prepare_container(workload: str, method: str) -> Task:
    """With all directions a linear rule in a container is the exact sum: checked on one module."""
    few, pool = pool_of(workload, 1), pool_of(workload)
    ranks = sum(u.rank for a in few.adapters for u in a.updates.values())
    whole: dict[str, Any] = {"rank": ranks} if method == "ctm" else {}
    found = fl.merge(few, method=method, rule="sum", **whole)
    _require_same(_pairs(found), _pairs(fl.merge(few, method="cat")))
    contenders = {
        OURS: Contender(partial(fl.merge, pool, method=method), thread_counts()),
        SVD_MERGE: Contender(partial(fl.merge, pool, method="svd", rank=RANK), thread_counts()),
    }
    return Task(contenders, find(workload).bytes)


def methods(workload: str) -> list[Contest]:
    """The contests of all methods that read the factors for their Gram blocks, over a whole model."""
    names = [n for n, m in fl.methods().items() if m.cost in COSTS and n not in ("svd", "slerp")]
    return [Contest(f"{n} merge, {workload}", (SVD_MERGE,), partial(_prepare_method, workload, n)) for n in names]


def _prepare_method(workload: str, method: str) -> Task:
    """One module is checked against the reference implementation of the passes and solvers."""
    few, pool = pool_of(workload, 1), pool_of(workload)
    with fl.use_backend("reference"):
        wanted = _pairs(fl.merge(few, method=method))
    _require_same(_pairs(fl.merge(few, method=method)), wanted)
    contenders = {
        OURS: Contender(partial(fl.merge, pool, method=method), thread_counts()[-1:], 3),
        SVD_MERGE: Contender(partial(fl.merge, pool, method="svd", rank=RANK), thread_counts()[-1:], 3),
    }
    return Task(contenders, find(workload).bytes)


def by_fastlora(pool: Pool) -> list[tuple[Tensor, Tensor]]:
    """``(B [n, r], A [r, m])`` of every module of the merged pool, in float32."""
    return _pairs(fl.merge(pool, method="svd", rank=RANK))


def _pairs(merged: fl.Adapter) -> list[tuple[Tensor, Tensor]]:
    return [pair for (pair,) in materialise_groups([[u.baked()] for u in merged.updates.values()], torch.float32)]


def _prepare(workload: Workload, opponents: Mapping[str, Merge]) -> Task:
    pool = make_pool(workload)
    right = merge_by_qr(pool)
    merges: dict[str, Merge] = {OURS: by_fastlora, **opponents}
    for merge in merges.values():
        _require_same(merge(pool), right)
    contenders = {name: Contender(partial(merge, pool), thread_counts()) for name, merge in merges.items()}
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
    return Task(contenders, workload.bytes, {torch.float32: 3 * 2 * ADAPTERS * RANK * 4096**2})


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Unavailable("merging against peft needs peft: `pip install 'fastlora[peft]'`") from None


def _require_same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    """The merged updates, on their first 256 rows."""
    for (B, A), (Bt, At) in zip(ours, theirs, strict=True):
        require("merged ΔW", B[:256] @ A, Bt[:256] @ At, 1e-4)
