"""One adapter of many: merge methods at their own length, and at the best of seven lengths on labelled rows.

    pip install scikit-learn peft
    python examples/merge_methods.py [--subjects digits,unbalanced,texts,left_out] [--seeds 5] [--out DIR] [--quick]

Every method is compared, seed by seed, with the sum whose length was swept on the same labelled rows. ``left_out``:
three domains of the digits are merged and scored on the fourth. Texts need more packages. Results:
docs/experiments.md.
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

from common import Results, arguments, console
from subjects import SUBJECTS, Numbers, Subject, available, measured, subject_of

import fastlora as fl

LENGTHS = [0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0]  # times the mean length of the adapters
INPUTS = [16, 64, 256]
SSR_INPUTS = 64
WHOLE: dict[str, object] = {"energy": 1.0}  # nothing is cut from what has a high rank
Build = Callable[[], fl.Adapter]

METHODS: dict[str, dict[str, object]] = {
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
HELD = ["sum", "mean", "matched norm", "TIES, PEFT's", "TSV-M, flat", "Iso-C", "Pico", "RegMean, 64 inputs a task"]
LEFT_OUT = "left_out"


def builds(subject: Subject, pool: fl.Pool) -> dict[str, Build]:
    """What merges a pool, which may be a part of that of the subject."""
    found: dict[str, Build] = {}
    for name, settings in METHODS.items():
        found[name] = lambda settings=settings: fl.merge(pool, **settings)
    for count in INPUTS:
        data = subject.inputs(count, False)
        found[f"RegMean, {count} inputs a task"] = lambda data=data: fl.merge(pool, method="regmean", data=data)
    seen = subject.inputs(SSR_INPUTS, True)
    found[f"SSR, {SSR_INPUTS} inputs a task"] = lambda: fl.merge(pool, method="ssr", data=seen)
    return found


def length(adapter: fl.Adapter) -> float:
    return math.sqrt(sum(float(adapter.delta(m).double().square().sum()) for m in adapter.modules))


def scaled(adapter: fl.Adapter, factor: float) -> fl.Adapter:
    found = fl.compose(f"{factor!r}*x", {"x": adapter})
    assert isinstance(found, fl.Adapter)
    return found


def compared(
    subject: Subject, found: Mapping[str, Build], unit: float, merged: Sequence[str], tested: Sequence[str]
) -> Numbers:
    """By method: accuracy on the tested tasks as it comes (``own``) and at the length that was best on labelled rows of
    the merged ones (``swept``), that length, its own, and the seconds of the merge."""

    def mean(adapter: fl.Adapter, tasks: Sequence[str], *, select: bool = False) -> float:
        accuracies = subject.accuracies(adapter, select)
        return statistics.fmean(accuracies[task] for task in tasks)

    numbers: Numbers = {}
    for name, build in found.items():
        start = time.process_time()
        adapter = build()
        seconds = time.process_time() - start
        size = length(adapter)
        row = {"own": mean(adapter, tested), "own length": size / unit, "cpu seconds": seconds}
        if size > 0:
            tried = {g: mean(scaled(adapter, g * unit / size), merged, select=True) for g in LENGTHS}
            best = max(tried, key=lambda g: tried[g])
            row |= {"swept": mean(scaled(adapter, best * unit / size), tested), "length": best}
        numbers[name] = row
    return numbers


def one_seed(name: str, seed: int, options: Namespace) -> Numbers:
    subject = subject_of("digits" if name == LEFT_OUT else name, seed, options)
    pool, tasks = subject.pool, subject.names
    unit = statistics.fmean(length(a) for a in pool.adapters)
    base = subject.accuracies(None, False)
    if name == LEFT_OUT:
        found: Numbers = {}
        for held in tasks:
            part = fl.Pool([a for a in pool.adapters if a.name != held])
            some = {n: b for n, b in builds(subject, part).items() if n in HELD}
            rest = [t for t in tasks if t != held]
            found[held] = {"base model": base[held], **compared(subject, some, unit, rest, [held])}
        return found
    own = {a.name: subject.accuracies(a, False)[a.name] for a in pool.adapters if a.name in tasks}
    return {
        "base model": statistics.fmean(base.values()),
        "each adapter on its own task": statistics.fmean(own.values()),
        "merged": compared(subject, builds(subject, pool), unit, tasks, tasks),
    }


def tables(data: Mapping[str, Numbers]) -> Results:
    results = Results()
    for subject, seeds in data["results"].items():
        for found in seeds.values():
            if subject == LEFT_OUT:
                base = statistics.fmean(of["base model"] for of in found.values())
                for name in HELD:
                    own, at_best = (statistics.fmean(of[name][k] for of in found.values()) for k in ("own", "swept"))
                    values = {"as it comes − base model": own - base, "swept − base model": at_best - base}
                    results.add("Leave-one-out, four domains of digits", name, values)
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


def main() -> None:
    options = arguments(__doc__, "merge_methods", {}, seeds=5, subjects=[*SUBJECTS, LEFT_OUT])
    subjects = available(options.subjects, options)
    settings = {"lengths": LENGTHS, "inputs": INPUTS, "ssr inputs": SSR_INPUTS, "methods": METHODS, "held": HELD}
    data = measured("merge_methods", subjects, settings, options, one_seed)
    results = tables(data)
    results.show()
    (options.out / "results.md").write_text(results.markdown() + "\n")
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
