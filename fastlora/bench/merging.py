"""The best rank-16 approximation of a sum of two rank-16 adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench.contest import OURS, Contest, Task, Unavailable, require
from fastlora.bench.dense import RANK, squares
from fastlora.bench.opponents import merge_by_dense_svd, merge_by_peft, merge_by_qr, peft_model
from fastlora.bench.timing import Contender, thread_counts
from fastlora.bench.workloads import Workload, make_pool
from fastlora.engine.materialise import materialise_groups

QR = "torch QR and small SVD"
DENSE = "torch dense SVD"
PEFT = 'peft, combination_type="svd", run once'

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
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Unavailable("merging against peft needs peft: `pip install 'fastlora[peft]'`") from None
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


def _require_same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    """The merged updates, on their first 256 rows."""
    for (B, A), (Bt, At) in zip(ours, theirs, strict=True):
        require("merged ΔW", B[:256] @ A, Bt[:256] @ At, 1e-4)
