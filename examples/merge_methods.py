"""One adapter of many: merge methods at their own length, and at the best of some lengths on labelled rows.

    pip install scikit-learn peft
    python examples/merge_methods.py [--subjects digits,texts,…] [--seeds 5] [--out DIR] [--quick]

Every method is compared, seed by seed, with the sum whose length was swept on the same labelled rows. ``left_out``,
``left_out_texts``, ``left_out_antibodies``: three domains of the digits, or three tasks, are merged and scored on the
fourth. Texts and antibodies need more packages. Results: docs/experiments.md.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import Results, arguments, console, shown
from subjects import LEFT_OUT, SUBJECTS, Kept, Numbers, Subject, available, measured, subject_of

import fastlora as fl

LENGTHS = {  # times the mean length of the adapters
    "digits": [0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0],
    "texts": [0.5, 1.0, 1.4, 2.0, 2.8],
}
FURTHER, LIMITS = 1.4, (0.05, 12.0)  # the lengths go on by this factor while the best is at an end
INPUTS = [16, 64, 256]
SSR_INPUTS = 64
PARTS = [(1.0, 64), (1.0, 256), (0.1, 256)]  # μ and inputs a task
LEARNED = {  # of what has a coefficient, and whether from labels
    "λ of tasks, learned with labels": ("task", True),
    "λ of modules, learned with labels": ("layer", True),
    "λ of modules, least entropy": ("layer", False),
}
RESCALED = {"mean": "sum", "matched norm": "sum"}  # the same but for its length
SHORT = ["sum", "mean", "matched norm", "equal energy"]  # without data; they differ in length, or by weights alone
WHOLE: dict[str, Any] = {"energy": 1.0}  # nothing is cut from what has a high rank
Build = Callable[[], fl.Adapter]

METHODS: dict[str, dict[str, Any]] = {
    "sum": {"method": "cat"},
    "mean": {"method": "mean"},
    "matched norm": {"method": "matched_norm"},
    "equal energy": {"method": "equal_energy"},
    "TIES, PEFT's": {"method": "ties", **WHOLE},
    "TIES, mergekit's": {"method": "ties", "convention": "mergekit", **WHOLE},
    "TIES, the paper's": {"method": "ties", "convention": "paper", **WHOLE},
    "DARE, density 0.5": {"method": "dare", "density": 0.5, **WHOLE},
    "TSV-M (in the core too)": {"method": "tsv"},
    "TSV-M, flat": {"method": "tsv", "spectrum": "flat"},
    "Iso-C": {"method": "iso_c", **WHOLE},
    "CtM, TIES": {"method": "ctm"},
    "CtM, sum": {"method": "ctm", "rule": "sum"},
    "Pico": {"method": "pico"},
    "KnOTS-TIES": {"method": "knots"},
    "Core-TIES": {"method": "core"},
}
ALL = [
    *METHODS,
    *[f"RegMean, {n} inputs a task" for n in INPUTS],
    *[f"sum of parts by {n} inputs a task, μ = {mu:g}" for mu, n in PARTS],
    *[f"SSR, {SSR_INPUTS} inputs a task"],
    *LEARNED,
]


def builds(subject: Subject, pool: fl.Pool, tasks: Sequence[str]) -> dict[str, Callable[[], Build]]:
    """The merges of a pool, which may be a part of that of the subject: what gathers the inputs that one needs, and
    returns it. With the rows that select for the ``tasks``."""

    @functools.cache
    def data(count: int, with_adapters: bool = False) -> fl.Statistics:
        every = subject.inputs(count, with_adapters)
        return fl.Statistics({name: every.of[name] for name in pool.names})

    def merge(**settings: Any) -> Callable[[], Build]:
        return lambda: functools.partial(fl.merge, pool, **settings)

    def by_inputs(method: str, count: int, with_adapters: bool = False) -> Callable[[], Build]:
        return lambda: functools.partial(fl.merge, pool, method=method, data=data(count, with_adapters))

    found = {name: merge(**settings) for name, settings in METHODS.items()}
    found |= {f"RegMean, {n} inputs a task": by_inputs("regmean", n) for n in INPUTS}
    for mu, n in PARTS:
        name = f"sum of parts by {n} inputs a task, μ = {mu:g}"
        found[name] = lambda mu=mu, n=n: functools.partial(sum_of_parts, pool, data(n), mu)
    found[f"SSR, {SSR_INPUTS} inputs a task"] = by_inputs("ssr", SSR_INPUTS, True)
    for name, (per, labels) in LEARNED.items():
        found[name] = lambda per=per, labels=labels: functools.partial(subject.learned, pool, tasks, per, labels)
    return found


def sum_of_parts(pool: fl.Pool, data: fl.Statistics, mu: float) -> fl.Adapter:
    """``Σ`` of what every adapter's own inputs need."""
    parts = fl.decompose(pool, inputs=data, mu=mu)
    total = fl.merge(fl.Pool([parts.unique_of(name) for name in pool.names]), method="cat")
    assert isinstance(total, fl.Adapter)
    return total


def length(adapter: fl.Adapter) -> float:
    return math.sqrt(sum(float(adapter.delta(m).double().square().sum()) for m in adapter.modules))


def best_length(score: Callable[[float], float], lengths: Sequence[float]) -> float:
    """Of the lengths, and of those beyond an end while the best is there."""
    tried = {length: score(length) for length in lengths}
    while True:
        best = max(tried, key=lambda length: tried[length])
        further = {min(tried): best / FURTHER, max(tried): best * FURTHER}.get(best)
        if further is None or not LIMITS[0] <= further <= LIMITS[1]:
            return best
        tried[further] = score(further)


def compared(
    prepare: Callable[[], Build],
    subject: Subject,
    merged: Sequence[str],
    tested: Sequence[str],
    lengths: Sequence[float],
    resized: Numbers | None = None,
) -> Numbers:
    """Of a method: accuracy on the tested tasks as it comes (``own``) and at the length that was best on labelled rows
    of the merged ones (``swept``), that length, its own, and the seconds of the merge. resized: the row of the method
    that differs by its length alone, if there is one."""

    def mean(adapter: fl.Adapter, tasks: Sequence[str], *, strength: float = 1.0, select: bool = False) -> float:
        return statistics.fmean(subject.accuracies(adapter, select, strength, tasks).values())

    unit = statistics.fmean(length(a) for a in subject.pool.adapters)
    build = prepare()
    start = time.process_time()
    adapter = build()
    seconds = time.process_time() - start
    size = length(adapter)
    row = {"own": mean(adapter, tested), "own length": size / unit, "cpu seconds": seconds}
    if resized is not None:
        return row | {key: resized[key] for key in ("swept", "length")}
    if size == 0:
        return row
    best = best_length(lambda times: mean(adapter, merged, strength=times * unit / size, select=True), lengths)
    return row | {"swept": mean(adapter, tested, strength=best * unit / size), "length": best}


def one_seed(name: str, seed: int, options: Namespace, kept: Kept) -> Numbers:
    whole = LEFT_OUT.get(name, name)
    lengths = LENGTHS["texts" if whole in ("texts", "antibodies") else "digits"]

    @functools.cache
    def subject() -> Subject:
        return subject_of(whole, seed, options)

    base = kept("base model", None, lambda: subject().accuracies(None, False))

    def merged(held: str | None) -> Numbers:
        """By method; a task that is held out is tested, or else all."""
        tasks = [task for task in base if task != held]

        @functools.cache
        def found() -> dict[str, Callable[[], Build]]:
            adapters = [a for a in subject().pool.adapters if subject().tasks[a.name] != held]
            return builds(subject(), fl.Pool(adapters), tasks)

        rows: Numbers = {}
        for method in ALL:

            def row(method: str = method) -> Numbers:
                resized = rows.get(RESCALED.get(method, ""))
                tested = tasks if held is None else [held]
                return compared(found()[method], subject(), tasks, tested, lengths, resized)

            settings = METHODS.get(method) or LEARNED.get(method)
            rows[method] = kept(method if held is None else f"{method}, without {held}", settings, row)
        return rows

    if name in LEFT_OUT:
        return {held: {"base model": base[held], **merged(held)} for held in base}

    def alone() -> float:
        pool = subject().pool
        return statistics.fmean(subject().accuracies(pool[t], False, tasks=[t])[t] for t in base)

    own = kept("each adapter on its own task", None, alone)
    return {"base model": statistics.fmean(base.values()), "each adapter on its own task": own, "merged": merged(None)}


def tables(data: Mapping[str, Numbers]) -> Results:
    results = Results()
    for subject, seeds in data["results"].items():
        for found in seeds.values():
            if subject in LEFT_OUT:
                base = statistics.fmean(of["base model"] for of in found.values())
                for name in ALL:
                    rows = [of[name] for of in found.values()]
                    values = {"as it comes − base model": statistics.fmean(row["own"] for row in rows) - base}
                    if all("swept" in row for row in rows):  # else one is zero, which has no length
                        values["swept − base model"] = statistics.fmean(row["swept"] for row in rows) - base
                    results.add(f"Leave-one-out, {SUBJECTS[LEFT_OUT[subject]]}", name, values)
                continue
            title = f"Merging, {SUBJECTS[subject]}"
            swept = found["merged"]["sum"]["swept"]
            for name in ("base model", "each adapter on its own task"):
                results.add(title, name, {"as it comes": found[name], "− swept sum": found[name] - swept})
            for name, row in found["merged"].items():
                values = {"as it comes": row["own"], "− swept sum": row["own"] - swept}
                if "swept" in row:  # else it is zero, which has no length
                    values |= {"swept": row["swept"], "swept − swept sum": row["swept"] - swept}
                    values |= {"best length": row["length"]}
                results.add(title, name, {**values, "own length": row["own length"], "cpu s": row["cpu seconds"]})
    return results


def regrets(data: Mapping[str, Numbers]) -> dict[str, dict[str, list[float]]]:
    """By rule without data and pool, how far it stays below the sum at its best length, one value a seed."""
    pools = {subject: seeds for subject, seeds in data["results"].items() if subject not in LEFT_OUT}
    return {
        name: {
            subject: [of["merged"]["sum"]["swept"] - of["merged"][name]["own"] for of in seeds.values()]
            for subject, seeds in pools.items()
        }
        for name in SHORT
    }


def regret_table(data: Mapping[str, Numbers]) -> str:
    """:func:`regrets` in Markdown, with the worst pool and the mean over pools."""
    found = regrets(data)
    pools = list(next(iter(found.values())))
    lines = ["### Regret: below the swept sum", "", f"| | {' | '.join(pools)} | worst | mean |"]
    lines.append("|---" * (len(pools) + 3) + "|")
    for name, of in found.items():
        means = [statistics.fmean(values) for values in of.values()]
        cells = [*map(shown, of.values()), f"{max(means):.3f}", f"{statistics.fmean(means):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__, "merge_methods", {}, seeds=5, subjects=[*SUBJECTS, *LEFT_OUT])
    subjects = available(options.subjects, options)
    settings = {"lengths": LENGTHS, "further": [FURTHER, *LIMITS]}
    rows = {"inputs": INPUTS, "ssr inputs": SSR_INPUTS, "methods": METHODS, "parts": PARTS, "learned": LEARNED}
    data = measured("merge_methods", subjects, settings, options, one_seed, rows)
    results = tables(data)
    results.show()
    table = regret_table(data) if set(data["results"]) - set(LEFT_OUT) else ""
    console.print(table, markup=False)
    (options.out / "results.md").write_text(f"{results.markdown()}\n{table}\n")
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
