"""Direction and magnitude on a small real model: reversing against plain negation, shifting against plain analogy.

    python examples/dipm.py [--out DIR] [--cache DIR] [--seeds 3] [--quick]

The operators are our definition (docs/dipm.md). LoRA adapters of all-MiniLM-L6-v2, those of examples/pem.py; results in
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Callable

from common import Results, arguments, console
from curves import Curves, equal_forgetting, plot_curves
from texts import NEEDED, Recipe, Texts

import fastlora as fl

TARGET, CONTROL = "trec", "movie"
STRENGTHS = [0.5, 1.0, 1.5, 2.0]
LEVELS = [0.45, 0.35, 0.25]
TRANSFERS = [0.5, 1.0]


def difference(first: fl.Adapter, second: fl.Adapter) -> float:
    """``‖first − second‖ / ‖second‖``, the largest of all modules."""
    deltas = [(first.delta(m).double(), second.delta(m).double()) for m in second.modules]
    return max(float((one - two).norm() / two.norm()) for one, two in deltas)


def unlearn(texts: Texts, target: fl.Adapter, control: fl.Adapter, results: Results, curves: Curves) -> None:
    """``reverse`` alone is negation, so what is compared is reversing what is left without the control's directions."""
    same = difference(fl.modulate(target, fl.dipm.reverse(0.7)), fl.negate(target, 0.7))
    if same > 1e-6:
        raise SystemExit(f"reverse is not negation: they differ by {same:.1e}")
    ways: dict[str, Callable[[float], fl.Adapter]] = {
        "negate = reverse": lambda strength: fl.negate(target, strength),
        **{
            f"remove, then reverse: {g}": lambda strength, g=g: fl.modulate(
                target, [fl.dipm.remove(control), fl.dipm.reverse(strength)], granularity=g
            )
            for g in ("column", "matrix")
        },
    }
    for name, way in ways.items():
        curve = [(texts.accuracy(None, TARGET), texts.accuracy(None, CONTROL))]
        for strength in STRENGTHS:
            adapter = way(strength)
            curve.append((texts.accuracy(adapter, TARGET), texts.accuracy(adapter, CONTROL)))
        for strength, (forgotten, kept) in zip([0.0, *STRENGTHS], curve, strict=True):
            values = {f"{TARGET} (target)": forgotten, f"{CONTROL} (control)": kept}
            results.add(f"Unlearning {TARGET}: {name}", f"λ = {strength:g}", values)
        curves.setdefault(name, []).append(curve)


def transfer(
    texts: Texts, task: fl.Adapter, source: fl.Adapter, target: fl.Adapter, results: Results, control: fl.Adapter
) -> None:
    """A classifier of product reviews on movie reviews. The control swaps source and target."""
    table = "Domain transfer to movie reviews, without their labels"
    classifier = texts.accuracy(task, "movie")
    results.add(table, "amazon classifier", {"movie": classifier})

    def score(name: str, adapter: fl.Adapter) -> None:
        accuracy = texts.accuracy(adapter, "movie")
        results.add(table, name, {"movie": accuracy, "gain over the classifier": accuracy - classifier})

    for strength in TRANSFERS:
        moved = {f"analogy, c₁ = {strength:g}": fl.analogy(task, target, source, 1.0, strength)}
        for granularity in ("column", "matrix"):
            operator = fl.dipm.shift(source, target, strength)
            moved[f"shift, {granularity}, λ = {strength:g}"] = fl.modulate(task, operator, granularity=granularity)
        for name, adapter in moved.items():
            score(name, adapter)
    wrong = fl.modulate(task, fl.dipm.shift(target, source, 1.0))
    score("shift, column, λ = 1, the wrong way", wrong)
    results.add(table, "trained on movie labels", {"movie": texts.accuracy(control, "movie")})


def main() -> None:
    options = arguments(__doc__, "dipm", NEEDED)
    results = Results()
    curves: Curves = {}
    for seed in range(options.seeds):
        console.print(f"seed {seed}")
        texts = Texts(options.cache, options.test_rows, seed)

        def trained(task: str, last: int, steps: int, objective: str = "labels", texts: Texts = texts) -> fl.Adapter:
            found = texts.adapter(Recipe(task, "lora", steps, 0, last, objective))
            assert isinstance(found, fl.Adapter)
            return found

        half = max(1, options.steps // 2)
        movie = trained("movie", 500, options.steps)
        unlearn(texts, trained("trec", 1000, options.steps), movie, results, curves)
        texts_of = [trained(domain, 1000, half, "texts") for domain in ("amazon", "movie")]
        transfer(texts, trained("amazon", 500, options.steps), *texts_of, results, movie)
    results.show()
    title = f"### Accuracy on {CONTROL} where {TARGET} has fallen to a level"
    lines = "\n".join([title, "", *equal_forgetting(curves, LEVELS, against="negate = reverse")])
    console.print(lines, markup=False)
    results.save(options.out, lines)
    labels = [(f"{TARGET}: to be forgotten", f"{CONTROL}: to be kept")]
    plot_curves({"reversing": curves}, labels, options.out / "reversing.png")
    console.print(f"written: {options.out}/results.json, results.md, reversing.png")


if __name__ == "__main__":
    main()
