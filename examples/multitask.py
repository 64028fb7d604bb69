"""Multi-task merging with and without extra vectors: one swept coefficient, or coefficients learned from entropy.

The shape of Table 1 of the DeVec paper: Task Arithmetic and AdaMerging (ICLR 2024), each on the adapters alone and on
the adapters with the shared components of all pairs. Beside each, as many random and leading directions in their place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common import Results
from torch import nn

import fastlora as fl

COEFFICIENTS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
START = 0.3  # AdaMerging's


@dataclass(frozen=True)
class Setting:
    """Adapters of one base model, one a task, and how a merge of them is measured and learned.

    score, validate: accuracy by task, on test rows and on labelled rows that are neither tested nor trained on.
    batches, loss: by task, without labels; what :meth:`fastlora.LearnedMerge.fit` takes.
    """

    title: str
    pool: fl.Pool
    score: Callable[[fl.Adapter], Mapping[str, float]]
    validate: Callable[[fl.Adapter], Mapping[str, float]]
    model: nn.Module
    batches: Mapping[str, list[Any]]
    loss: Any
    steps: int
    lr: float
    threshold: float
    rank: int | None = None


def variants(setting: Setting, seed: int) -> dict[str, dict[str, fl.Adapter]]:
    """The extra vectors by kind: none, the shared components of all pairs, and their controls."""
    parts = fl.decompose(setting.pool, setting.threshold, mode="pairs", rank=setting.rank)
    return {
        "": {},
        " + Shared": {f"{a}+{b}": pair.shared for (a, b), pair in parts.pairs.items()},
        " + random control": fl.control(parts, "random", seed=seed),
        " + top control": fl.control(parts, "top"),
    }


def total(names: Mapping[str, fl.Adapter]) -> str:
    """An expression of :func:`fastlora.compose`: ``w`` times the sum of all."""
    return f"w*({' + '.join(repr(name) for name in names)})"


def task_arithmetic(setting: Setting, vectors: Mapping[str, fl.Adapter]) -> tuple[fl.Adapter, float]:
    """``w Σ ΔW_k`` with the ``w`` whose mean accuracy over the tasks is best on validation rows."""

    def on_validation(adapter: fl.Adapter) -> float:
        return statistics.fmean(setting.validate(adapter).values())

    swept = fl.sweep(total(vectors), {"w": COEFFICIENTS}, adapters=vectors, score=on_validation)
    best = swept.best().point["w"]
    merged = fl.compose(total(vectors), vectors, numbers={"w": best})
    assert isinstance(merged, fl.Adapter)
    return merged, best


def adamerging(setting: Setting, vectors: Mapping[str, fl.Adapter], per: str) -> tuple[fl.Adapter, dict[str, float]]:
    """``Σ λ_k ΔW_k`` with the ``λ`` of least entropy on unlabelled batches, and the mean ``λ`` of every vector."""
    with fl.LearnedMerge(setting.model, vectors, per=per, init=START) as merge:
        merge.fit(setting.batches, setting.loss, steps=setting.steps, lr=setting.lr)
        used = merge.used().detach().double()
        means = used if per == "task" else used.mean(0)
        return merge.adapter(), dict(zip(merge.components, means.tolist(), strict=True))


def compare(setting: Setting, seed: int, results: Results) -> None:
    """One table. ``gain``: of the mean over the tasks, over the same method without extra vectors, seed by seed."""
    alone = dict(zip(setting.pool.names, setting.pool.adapters, strict=True))
    without: dict[str, float] = {}

    def row(method: str, extra: str, merged: fl.Adapter, more: Mapping[str, float]) -> None:
        mean = statistics.fmean(setting.score(merged).values())
        without.setdefault(method, mean)
        gain = {"gain": mean - without[method]} if extra else {}
        results.add(setting.title, f"{method}{extra}", {"mean accuracy": mean, **gain, **more})

    base = fl.compose("0*x", {"x": next(iter(alone.values()))})
    results.add(setting.title, "base model", {"mean accuracy": statistics.fmean(setting.score(base).values())})
    own = statistics.fmean(setting.score(adapter)[task] for task, adapter in alone.items())
    results.add(setting.title, "each adapter on its own task", {"mean accuracy": own})
    extras = variants(setting, seed)
    for extra, more in extras.items():
        merged, best = task_arithmetic(setting, alone | more)
        row("Task Arithmetic", extra, merged, {"λ of tasks": best, **({"λ of extras": best} if more else {})})
    for method, per in {"AdaMerging, task-wise": "task", "AdaMerging, layer-wise": "layer"}.items():
        for extra, more in extras.items():
            merged, means = adamerging(setting, alone | more, per)
            found = {"λ of tasks": statistics.fmean(means[k] for k in alone)}
            found |= {"λ of extras": statistics.fmean(means[k] for k in more)} if more else {}
            row(method, extra, merged, found)
    for extra, more in extras.items():
        vectors = alone | more
        start = fl.compose(total(vectors), vectors, numbers={"w": START})
        row(f"all λ = {START}, not learned", extra, start, {})
