"""Shared and unique components of a small vision transformer's fine-tunes: generalisation and forgetting.

    pip install scikit-learn peft
    python examples/devec.py [--out DIR] [--seeds 3] [--jobs 1] [--quick]

Of full fine-tunes and of LoRA adapters. Leave-one-out: three domains are merged and scored on the fourth. Forgetting:
an adapter is negated as a whole, or only what it does not share. Each with its controls, and over thresholds τ. For
multi-task merging see merging.py. Results: docs/experiments.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from common import Results, arguments, console, of_seeds
from curves import Curve, Curves, equal_forgetting, plot_curves
from digits import DOMAINS, NEEDED, POOLS, Digits, deltas_of
from negation import STRENGTHS, forget, gather, kept, over_thresholds

import fastlora as fl
from fastlora.decomposition.plots import plot_spectrum
from fastlora.decomposition.report import Report

COEFFICIENTS = [0.1, 0.2, 0.3, 0.5, 0.8]
LEVELS = [0.50, 0.40, 0.30, 0.20]


@dataclass
class Setting:
    """One kind of adapter. thresholds: others than ``threshold``, which has the controls. rank: how many leading
    directions of every module are compared; all if None."""

    title: str
    threshold: float
    thresholds: list[float]
    rank: int | None

    def cuts(self, threshold: float) -> str:
        """Options of ``shared`` and ``unique`` in an expression."""
        return f"threshold={threshold}" + ("" if self.rank is None else f", rank={self.rank}")

    def shared(self, names: list[str], threshold: float) -> str:
        """The sum of what all pairs share, as an expression."""
        return " + ".join(f"shared({a}, {b}, {self.cuts(threshold)})" for a, b in combinations(names, 2))

    def unique(self, name: str, names: list[str], threshold: float) -> str:
        """What an adapter shares with none of the others, as an expression."""
        return f"unique({name} | {', '.join(n for n in names if n != name)}, {self.cuts(threshold)})"

    def uniques(self, names: list[str], threshold: float) -> str:
        return " + ".join(self.unique(name, names, threshold) for name in names)


SETTINGS = {
    # A full fine-tune spans every direction, so only the leading ones can be compared; τ is the paper's.
    "full": Setting(POOLS["full"], 0.85, [0.5, 0.7, 0.95], 8),
    # Left spectra of LoRA adapters stay far below 0.85.
    "lora": Setting(POOLS["lora"], 0.3, [0.1, 0.2, 0.5], None),
}


def merge_and_score(
    digits: Digits, expression: str, adapters: Mapping[str, fl.Adapter], merged: list[str], held: str
) -> tuple[float, float, float]:
    """Accuracy on the held-out domain and on the merged ones, and the coefficient of the sum: the best one on
    validation pictures of the domains that were merged, so the held-out domain decides nothing."""
    total = fl.compose(expression, adapters)

    def on_validation(adapter: fl.Adapter) -> float:
        return digits.mean_accuracy(digits.state(deltas_of(adapter)), merged, test=False)

    best = fl.sweep(lambda p: p["w"] * total, {"w": COEFFICIENTS}, score=on_validation).best().point["w"]
    state = digits.state(deltas_of(best * total))
    return digits.accuracy(state, held), digits.mean_accuracy(state, merged), best


def leave_one_out(
    digits: Digits, adapters: Mapping[str, fl.Adapter], setting: Setting, seed: int, results: Results
) -> None:
    """Means over the held-out domains, at the setting's threshold with controls, and over the others."""
    scores: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    title = f"Leave-one-out generalisation, {setting.title}, τ = {setting.threshold}"
    over = f"Leave-one-out generalisation over thresholds, {setting.title}"
    for held in adapters:
        names = [n for n in adapters if n != held]
        parts = fl.decompose(fl.Pool(adapters[n] for n in names), setting.threshold, mode="pairs", rank=setting.rank)
        known = dict(adapters)
        for kind in ("random", "top"):
            known |= {f"{kind} {pair}": extra for pair, extra in fl.control(parts, kind, seed=seed).items()}
        TV, shared = " + ".join(names), setting.shared(names, setting.threshold)
        sums = {"TV": TV, "TV + Shared": f"{TV} + {shared}"}
        for kind in ("random", "top"):
            extra = " + ".join(repr(n) for n in known if n.startswith(f"{kind} "))
            sums[f"TV + {kind} control"] = f"{TV} + {extra}"
        unique = setting.uniques(names, setting.threshold)
        sums |= {"Unique + Shared": f"{unique} + {shared}", "Unique only": unique, "Shared only": shared}
        states = digits.accuracy(digits.base, held), digits.mean_accuracy(digits.base, names), 0.0
        scores.setdefault(title, {}).setdefault("base model", []).append(states)
        for name, expression in sums.items():
            found = merge_and_score(digits, expression, known, names, held)
            scores[title].setdefault(name, []).append(found)
        for threshold in setting.thresholds:
            shared, unique = setting.shared(names, threshold), setting.uniques(names, threshold)
            for name, expression in {
                "TV + Shared": f"{TV} + {shared}",
                "Unique + Shared": f"{unique} + {shared}",
            }.items():
                found = merge_and_score(digits, expression, adapters, names, held)
                scores.setdefault(over, {}).setdefault(f"{name}, τ = {threshold}", []).append(found)
    for table, rows in scores.items():
        for name, of_held in rows.items():
            values = [statistics.fmean(v) for v in zip(*of_held, strict=True)]
            columns = dict(zip(["held-out domain", "merged domains", "coefficient"], values, strict=True))
            if name == "base model":
                del columns["coefficient"]
            results.add(table, name, columns)


def spectra(pool: fl.Pool, setting: Setting, results: Results) -> fl.Decomposition:
    """How many directions pairs share, beside what random subspaces would."""
    parts = fl.decompose(pool, setting.threshold, mode="pairs", rank=setting.rank)
    compared = "" if setting.rank is None else f", of the {setting.rank} leading ones of every module"
    for report in parts.reports:
        values = {"shared": report.shared_directions, "by chance": report.expected_by_chance}
        title = f"Directions shared by pairs, {setting.title}, τ = {setting.threshold}{compared}"
        results.add(title, report.title, values)
    return parts


@dataclass
class Seed:
    """What one seed found: by kind of adapter, curves of forgetting, and of forgetting over thresholds."""

    results: Results
    curves: dict[str, dict[str, Curve]]
    of_threshold: dict[str, dict[str, Curve]]
    report: Report


def one_seed(seed: int, quick: bool) -> Seed:
    console.print(f"seed {seed}: training the base model and {len(DOMAINS)} fine-tunes of each kind")
    digits, results = Digits(seed, shorter=20 if quick else 1), Results()
    curves, of_threshold, reports = {}, {}, []
    for kind, setting in SETTINGS.items():
        adapters = digits.adapters(kind)
        own_domain(digits, adapters, kind, results)
        reports += spectra(fl.Pool(adapters.values()), setting, results).reports
        console.print(f"seed {seed}, {setting.title}: leave-one-out")
        leave_one_out(digits, adapters, setting, seed, results)
        console.print(f"seed {seed}, {setting.title}: negation")

        def unique(
            name: str, threshold: float, setting: Setting = setting, adapters: Mapping[str, fl.Adapter] = adapters
        ) -> fl.Adapter:
            part = fl.compose(setting.unique(name, list(adapters), threshold), adapters)
            assert isinstance(part, fl.Adapter)
            return part

        curves[kind] = forget(digits, adapters, unique, setting.threshold, seed)
        for name, curve in curves[kind].items():
            for strength, (target, others) in zip([0.0, *STRENGTHS], curve, strict=True):
                values = {"target": target, "other domains": others}
                results.add(f"Negation, {setting.title}: {name}", f"λ = {strength:g}", values)
        over = over_thresholds(digits, adapters, unique, setting.thresholds)
        main = {f"unique, τ = {setting.threshold}": curves[kind]["unique"]}
        of_threshold[kind] = {"whole": curves[kind]["whole"], **main, **over}
        for threshold in sorted([setting.threshold, *setting.thresholds]):
            share = {"share of ‖ΔW‖²": kept(adapters, unique, threshold)}
            results.add(f"What unique components keep, {setting.title}", f"τ = {threshold}", share)
    return Seed(results, curves, of_threshold, reports[0])


def own_domain(digits: Digits, adapters: Mapping[str, fl.Adapter], kind: str, results: Results) -> None:
    for name, adapter in adapters.items():
        alone = {"LoRA" if kind == "lora" else "its weight matrices alone": deltas_of(adapter)}
        values = {column: digits.accuracy(digits.state(deltas), name) for column, deltas in alone.items()}
        if kind == "full":
            tuned = digits.accuracy(digits.vectors[name].apply(digits.base), name)
            values = {"base model": digits.accuracy(digits.base, name), "fine-tune": tuned} | values
        results.add("Accuracy on its own domain", name, values)


def main() -> None:
    options = arguments(__doc__, "devec", NEEDED)
    results = Results()
    curves: dict[str, Curves] = {kind: {} for kind in SETTINGS}
    of_threshold: dict[str, Curves] = {kind: {} for kind in SETTINGS}
    for found in of_seeds(partial(one_seed, quick=options.quick), options):
        results.extend(found.results)
        for kind in SETTINGS:
            gather(curves[kind], found.curves[kind])
            gather(of_threshold[kind], found.of_threshold[kind])
    lines = []
    for kind, setting in SETTINGS.items():
        for what, own in {"": curves[kind], ", over thresholds": of_threshold[kind]}.items():
            title = f"### Accuracy on the other domains where the target has fallen to a level, {setting.title}{what}"
            lines += [title, "", *equal_forgetting(own, LEVELS, against="whole"), ""]
    results.show()
    console.print("\n".join(lines), markup=False)
    results.save(options.out, "\n".join(lines))
    labels = [("target: to be forgotten", "other domains: to be kept")] * len(SETTINGS)
    plot_curves({s.title: curves[k] for k, s in SETTINGS.items()}, labels, options.out / "negation.png")
    plot_curves({s.title: of_threshold[k] for k, s in SETTINGS.items()}, labels, options.out / "thresholds.png")
    plot_spectrum(found.report, options.out / "spectrum.png")
    console.print(f"written: {options.out}/results.json, results.md, negation.png, thresholds.png, spectrum.png")


if __name__ == "__main__":
    main()
