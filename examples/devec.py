"""Shared and unique components of full fine-tunes of a small vision transformer: generalisation and forgetting.

    pip install scikit-learn
    python examples/devec.py [--out DIR] [--seeds 3] [--quick]

Leave-one-out: three domains are merged and scored on the fourth. Forgetting: a whole task vector is negated, or only
what it does not share. Each with its control. Results: docs/experiments.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from common import Results, arguments, console
from curves import Curve, Curves, equal_forgetting, plot_curves
from digits import DOMAINS, Digits, State, deltas_of

import fastlora as fl
from fastlora.plots import plot_spectrum

THRESHOLD = 0.85  # the paper's
RANK = 8  # of 64 or more: only leading directions are compared, since a full fine-tune spans everything
COEFFICIENTS = [0.1, 0.2, 0.4, 0.8]
STRENGTHS = [0.5, 1.0, 1.5, 2.5]
LEVELS = [0.50, 0.40, 0.30, 0.20]
CONTROLS = ["random", "top"]


def uniques(pool: fl.Pool) -> list[fl.Adapter]:
    """Of each adapter, what it shares with none of the others."""
    return [
        fl.decompose(pool, THRESHOLD, mode="iterative", rank=RANK, target=name).unique_of(name) for name in pool.names
    ]


def leave_one_out(digits: Digits, adapters: Mapping[str, fl.Adapter], seed: int, results: Results) -> None:
    """Means over the held-out domains. One coefficient multiplies all terms of a sum; it is the one that is best on
    validation pictures of the domains that were merged, so the held-out domain decides nothing."""
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for held in adapters:
        pool = fl.Pool(a for n, a in adapters.items() if n != held)
        parts = fl.decompose(pool, THRESHOLD, mode="pairs", rank=RANK)
        shared = [pair.shared for pair in parts.pairs.values()]
        unique = uniques(pool)
        sums: dict[str, list[fl.Adapter]] = {
            "base model": [],
            "TV": list(pool.adapters),
            "TV + Shared": [*pool.adapters, *shared],
            "TV + random control": [*pool.adapters, *fl.control(parts, "random", seed=seed).values()],
            "TV + top control": [*pool.adapters, *fl.control(parts, "top").values()],
            "Unique + Shared": [*unique, *shared],
            "Unique only": unique,
            "Shared only": shared,
        }
        for name, terms in sums.items():
            deltas = deltas_of(fl.add(terms)) if terms else {}
            states = {c: digits.state(deltas, c) for c in (COEFFICIENTS if terms else [0.0])}

            on_merged = {
                c: statistics.fmean(digits.accuracy(state, n, test=False) for n in pool.names)
                for c, state in states.items()
            }
            best = max(on_merged, key=on_merged.__getitem__)
            within = statistics.fmean(digits.accuracy(states[best], n) for n in pool.names)
            scores.setdefault(name, []).append((digits.accuracy(states[best], held), within, best))
    for name, found in scores.items():
        out, within, coefficient = (statistics.fmean(v) for v in zip(*found, strict=True))
        results.add(
            "Leave-one-out generalisation",
            name,
            {"held-out domain": out, "merged domains": within, "coefficient": coefficient},
        )


def without_directions(adapter: fl.Adapter, unique: fl.Adapter, kind: str, seed: int) -> State:
    """A control: the adapter without as many directions as its unique component lacks, random or leading ones of its
    own column space."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, delta in deltas_of(adapter).items():
        removed = delta.double() - unique.delta(module).double() if module in unique else delta.double()
        count = int(torch.linalg.matrix_rank(removed, rtol=1e-4))
        U, sigma, _ = torch.linalg.svd(delta.double(), full_matrices=False)
        U = U[:, sigma > 1e-6 * sigma[0]]
        if kind == "random":
            U = U @ torch.linalg.qr(torch.randn(U.shape[1], count, generator=generator, dtype=torch.float64)).Q
        Z = U[:, :count]
        found[module] = (delta.double() - Z @ (Z.mT @ delta.double())).float()
    return found


def forget(digits: Digits, adapters: Mapping[str, fl.Adapter], seed: int, curves: Curves) -> None:
    """Accuracy on the target against the mean of the others, over strengths; means over the targets."""
    found: dict[str, list[Curve]] = {}
    for target, unique in zip(adapters, uniques(fl.Pool(adapters.values())), strict=True):
        kinds = {"whole": deltas_of(adapters[target]), "unique": deltas_of(unique)}
        kinds |= {f"without {k} directions": without_directions(adapters[target], unique, k, seed) for k in CONTROLS}
        for kind, deltas in kinds.items():
            curve = []
            for strength in [0.0, *STRENGTHS]:
                state = digits.state(deltas, -strength)
                others = statistics.fmean(digits.accuracy(state, n) for n in adapters if n != target)
                curve.append((digits.accuracy(state, target), others))
            found.setdefault(kind, []).append(curve)
    for kind, own in found.items():
        points = [
            (statistics.fmean(t for t, _ in at), statistics.fmean(o for _, o in at)) for at in zip(*own, strict=True)
        ]
        curves.setdefault(kind, []).append(points)


def spectra(pool: fl.Pool, results: Results) -> fl.Decomposition:
    """How many directions pairs share, beside what random subspaces would."""
    parts = fl.decompose(pool, THRESHOLD, mode="pairs", rank=RANK)
    for report in parts.reports:
        values = {"shared": report.shared_directions, "by chance": report.expected_by_chance}
        results.add(f"Directions shared by pairs, rank {RANK} of every module", report.title, values)
    return parts


def main() -> None:
    options = arguments(__doc__, "devec", {"sklearn": "scikit-learn"})
    results = Results()
    curves: Curves = {}
    for seed in range(options.seeds):
        console.print(f"seed {seed}: training the base model and {len(DOMAINS)} fine-tunes")
        digits = Digits(seed, shorter=20 if options.quick else 1)
        adapters = {name: vector.extract(energy=1.0) for name, vector in digits.vectors.items()}
        for name, vector in digits.vectors.items():
            alone = {
                "base model": digits.accuracy(digits.base, name),
                "fine-tune": digits.accuracy(vector.apply(digits.base), name),
                "its weight matrices alone": digits.accuracy(digits.state(deltas_of(adapters[name])), name),
            }
            results.add("Accuracy on its own domain", name, alone)
        parts = spectra(fl.Pool(adapters.values()), results)
        leave_one_out(digits, adapters, seed, results)
        forget(digits, adapters, seed, curves)
    for kind, own in curves.items():
        for curve in own:
            for strength, (target, others) in zip([0.0, *STRENGTHS], curve, strict=True):
                values = {"target": target, "other domains": others}
                results.add(f"Negation: {kind}", f"λ = {strength:g}", values)
    results.show()
    title = "### Accuracy on the other domains where the target has fallen to a level"
    lines = "\n".join([title, "", *equal_forgetting(curves, LEVELS)])
    console.print(lines, markup=False)
    results.save(options.out, lines)
    labels = [("target: to be forgotten", "other domains: to be kept")]
    plot_curves({"negation": curves}, labels, options.out / "negation.png")
    plot_spectrum(parts.reports[0], options.out / "spectrum.png")
    console.print(f"written: {options.out}/results.json, results.md, negation.png, spectrum.png")


if __name__ == "__main__":
    main()
