"""Forgetting one task and keeping the others: adapters are negated whole, or parts of them by columns or by inputs.

    pip install scikit-learn peft
    python examples/negation_by_inputs.py [--subjects digits,texts,…] [--seeds 5] [--out DIR] [--quick]

Every task is forgotten once; the others are the control. Compared is the accuracy on the others where the target has
lost as much. Texts and antibodies need more packages. Results: docs/experiments.md.
"""

from __future__ import annotations

import functools
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import Results, arguments, console
from curves import Curve, control_at
from subjects import SUBJECTS, Kept, Numbers, Subject, available, measured, subject_of

import fastlora as fl

STRENGTHS = {"digits": [0.3, 0.6, 1, 1.5, 2.5, 4, 7, 12], "texts": [0.3, 0.6, 1, 1.8, 3, 6]}
DROPS = [0.05, 0.10, 0.20]
INPUTS = [16, 64, 256]
CONTROLLED = 64  # inputs of the controls and of the other μ
MU, OTHER_MU = 1.0, 10.0


def without_columns_of_others(pool: fl.Pool, target: str) -> fl.Adapter:
    """The adapter without the union of the others' column spaces: ``(I − QQᵀ)ΔW``."""
    factors = {}
    for module in pool[target].modules:
        others = [a.delta(module).double() for a in pool.adapters if a.name != target and module in a]
        U, sigma, _ = torch.linalg.svd(torch.cat(others, 1), full_matrices=False)
        Q = U[:, sigma > 1e-5 * sigma[0]]
        delta = pool[target].delta(module).double()
        left, sizes, right = torch.linalg.svd(delta - Q @ (Q.mT @ delta), full_matrices=False)
        rank = max(u.rank for u in [pool[target].updates[module]])
        factors[module] = ((left * sizes)[:, :rank].float().contiguous(), right[:rank].float().contiguous())
    return fl.Adapter.from_tensors(factors, name="others_columns")


Parts = dict[str, fl.Adapter]  # what is negated, by adapter


def kinds_of(subject: Callable[[], Subject], seed: int) -> dict[str, Callable[[], Parts]]:
    @functools.cache
    def by_inputs(count: int, mu: float = MU) -> fl.InputDecomposition:
        data = subject().inputs(count, False) if mu == MU else by_inputs(count).inputs
        return fl.decompose(subject().pool, inputs=data, mu=mu)

    def each(part: Callable[[fl.Pool, str], fl.Adapter]) -> Callable[[], Parts]:
        return lambda: {name: part(subject().pool, name) for name in subject().pool.names}

    def without_shared(pool: fl.Pool, name: str) -> fl.Adapter:
        return fl.decompose(pool, subject().threshold, mode="iterative", target=name).unique_of(name)

    def unique(*which: Any) -> Callable[[], Parts]:
        return each(lambda pool, name: by_inputs(*which).unique_of(name))

    found = {"whole": each(lambda pool, name: pool[name]), "unique (columns)": each(without_shared)}
    found["without all columns of others"] = each(without_columns_of_others)
    for count in INPUTS:
        found[f"by inputs, {count} a task"] = unique(count)
    for kind in ("permuted_inputs", "shuffled_tasks"):
        name = f"control: {kind.replace('_', ' ')}, {CONTROLLED}"
        found[name] = lambda kind=kind: fl.control(by_inputs(CONTROLLED), kind, seed=seed)
    found[f"by inputs, {CONTROLLED} a task, μ = {OTHER_MU:g}"] = unique(CONTROLLED, OTHER_MU)
    return found


def point(accuracies: Mapping[str, float], target: str) -> tuple[float, float]:
    """Accuracy on the target, and the mean of the others."""
    return accuracies[target], statistics.fmean(x for task, x in accuracies.items() if task != target)


def curve_of(subject: Subject, part: fl.Adapter, target: str, strengths: list[float], base: Curve) -> Curve:
    """Accuracy on the target and the mean of the others over strengths; it ends where the target has lost enough."""
    curve = list(base)
    for strength in strengths:
        curve.append(point(subject.accuracies(part, False, -strength), target))
        if curve[-1][0] < base[0][0] - max(DROPS):
            break
    return curve


def one_seed(name: str, seed: int, options: Namespace, kept: Kept) -> Numbers:
    """``{kind: {target: curve}}``."""
    strengths = STRENGTHS["texts" if name in ("texts", "antibodies") else "digits"]
    strengths = strengths[::4] if options.quick else strengths

    @functools.cache
    def subject() -> Subject:
        return subject_of(name, seed, options)

    base = kept("base model", None, lambda: subject().accuracies(None, False))

    def curves(parts: Callable[[], Parts]) -> dict[str, Curve]:
        targets = {task: adapter for adapter, task in reversed(subject().tasks.items())}
        of = parts()
        return {t: curve_of(subject(), of[a], t, strengths, [point(base, t)]) for t, a in targets.items()}

    return {kind: kept(kind, None, functools.partial(curves, parts)) for kind, parts in kinds_of(subject, seed).items()}


def at_drops(found: Mapping[str, Mapping[str, Curve]]) -> dict[str, dict[float, dict[str, float | None]]]:
    """Accuracy on the others where the target has lost so much: ``{kind: {drop: {target: accuracy}}}``."""
    return {
        kind: {
            drop: {t: control_at([(x, y) for x, y in curve], curve[0][0] - drop) for t, curve in curves.items()}
            for drop in DROPS
        }
        for kind, curves in found.items()
    }


def gains(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> list[float]:
    """Differences of the targets that both reach."""
    pairs = [(one[t], other[t]) for t in one]
    return [a - b for a, b in pairs if a is not None and b is not None]


def tables(data: Mapping[str, Numbers]) -> Results:
    results = Results()
    for subject, seeds in data["results"].items():
        for found in seeds.values():
            levels = at_drops(found)
            for kind, of_drop in levels.items():
                for drop in DROPS:
                    against = levels["whole"][drop]
                    title = f"Negation, {SUBJECTS[subject]}: accuracy on the others, minus that of the whole adapter"
                    differences = gains(of_drop[drop], against)
                    reached = sum(v is not None for v in of_drop[drop].values()) / len(of_drop[drop])
                    if differences and kind != "whole":
                        values = {f"target −{100 * drop:.0f} points": statistics.fmean(differences)}
                        results.add(title, kind, values)
                    results.add(f"{title}: share of targets that lose it", kind, {f"−{100 * drop:.0f}": reached})
                lost = [curves[0][1] - at for t, curves in found[kind].items() if (at := of_drop[0.10][t]) is not None]
                if lost:
                    results.add(f"{title}: points lost", kind, {"at −10 points": statistics.fmean(lost)})
    return results


def main() -> None:
    options = arguments(__doc__, "negation_by_inputs", {}, seeds=5, subjects=list(SUBJECTS))
    subjects = available(options.subjects, options)
    settings = {"strengths": STRENGTHS, "drops": DROPS, "μ": MU}
    rows = {"inputs": INPUTS, "controlled": CONTROLLED, "other μ": OTHER_MU}
    data = measured("negation_by_inputs", subjects, settings, options, one_seed, rows)
    results = tables(data)
    results.show()
    (options.out / "results.md").write_text(results.markdown() + "\n")
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
