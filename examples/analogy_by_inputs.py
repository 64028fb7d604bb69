"""A task in a domain that it was never trained in, by analogy: adapters are moved whole, or by parts that inputs tell.

    pip install scikit-learn peft
    python examples/analogy_by_inputs.py [--subjects digits,texts] [--seeds 5] [--out DIR] [--quick]

The task in the target domain is ``task(source) + c·(other(target) − other(source))``; nothing is trained on the task in
the target. Of digits, in four domains, the task is to tell 5 to 9 apart, the other task 0 to 4. Of reviews, of films
and of products, the task is their sentiment; the other adapters saw texts without labels. Texts need more packages.
Results: docs/experiments.md.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Protocol

import torch
from common import Results, arguments, console
from subjects import PLACES, TEST_STEP, TEXT_ROWS, TEXT_STEP, VALIDATION, Kept, Numbers, available, measured
from torch.func import functional_call

import fastlora as fl

TASK, OTHER = range(5, 10), range(5)  # of digits
REVIEWS = ["movie", "amazon"]
STRENGTHS = [0.25, 0.5, 1.0, 1.5]  # c
INPUTS = [64, 256]  # of the other task, unlabelled; the controls have the most
MU = 1.0
TABLES = {
    "digits": "Analogy, ordered pairs of four domains of digits",
    "texts": "Analogy, reviews of films and of products, both ways",
}
SETTINGS = {"strengths": STRENGTHS, "inputs": INPUTS, "μ": MU, "task": [*TASK], "other task": [*OTHER]}
Pair = tuple[fl.Adapter, fl.Adapter]


class Accuracy(Protocol):
    def __call__(self, adapter: fl.Adapter | None, domain: str, *, select: bool) -> float: ...


@dataclass(frozen=True)
class Halves:
    """A seed's adapters of both tasks by domain; ``inputs(n)``: by domain, statistics of ``n`` unlabelled inputs of the
    other task in the base model; ``accuracy`` of the task in a domain, on rows that select or on test rows."""

    task: Mapping[str, fl.Adapter]
    other: Mapping[str, fl.Adapter]
    inputs: Callable[[int], dict[str, fl.Statistics]]
    accuracy: Accuracy


def halves_of(name: str, seed: int, options: Namespace) -> Halves:
    if name == "texts":
        from texts import Texts

        return of_texts(Texts(options.cache, options.test_rows, seed), options.steps, 8 if options.quick else None)
    from digits import Digits

    return of_digits(Digits(seed, 20 if options.quick else 1, options.cache))


def of_digits(found: Any) -> Halves:
    from digits import DOMAINS, deltas_of, of_classes

    task, other = ({d: found.drawn_lora(f"{d}_{of[0]}-{of[-1]}", d, of) for d in DOMAINS} for of in (TASK, OTHER))

    def inputs(n: int) -> dict[str, fl.Statistics]:
        found.model.load_state_dict(found.base)
        of = {}
        for domain, adapter in other.items():
            pictures, _ = of_classes(*found.tune[domain], OTHER)
            of[domain] = fl.statistics(found.model, {adapter.name: [pictures[:n]]}, adapter.modules, tokens=PLACES)
        return of

    @torch.no_grad()
    def accuracy(adapter: fl.Adapter | None, domain: str, *, select: bool) -> float:
        state = found.base if adapter is None else found.state(deltas_of(adapter))
        x, y = found.validation[domain] if select else (t[::TEST_STEP] for t in found.test[domain])
        x, y = of_classes(x, y, TASK)
        scores = functional_call(found.model.eval(), state, (x,))[:, list(TASK)]
        return float((scores.argmax(1) + TASK[0] == y).double().mean())

    return Halves(task, other, inputs, accuracy)


def of_texts(found: Any, steps: int, few: int | None) -> Halves:
    """few: so many rows are tested, or all."""
    from texts import Recipe

    task = {d: found.adapter(Recipe(d, "lora", steps, 0, TEXT_ROWS[d]), d) for d in REVIEWS}
    unlabelled = {d: Recipe(d, "lora", max(1, steps // 2), 0, 1000, "texts") for d in REVIEWS}
    other = {d: found.adapter(recipe, f"{d}_texts") for d, recipe in unlabelled.items()}

    def inputs(n: int) -> dict[str, fl.Statistics]:
        of = {}
        for domain, adapter in other.items():
            rows = [text for text, _ in found.task(domain)[0][:n]]
            batches = {adapter.name: [found.tokens(rows[i : i + 64]) for i in range(0, n, 64)]}
            of[domain] = fl.statistics(found.model, batches, adapter.modules, tokens=PLACES)
        return of

    def accuracy(adapter: fl.Adapter | None, domain: str, *, select: bool) -> float:
        training, test, _ = found.task(domain)
        with torch.autocast("cpu", torch.bfloat16), found.with_adapter(adapter):
            return float(found.accuracy(None, domain, (training[VALIDATION] if select else test[::TEXT_STEP])[:few]))

    return Halves(task, other, inputs, accuracy)


def pairs_of(
    halves: Halves, target: str, source: str, inputs: Mapping[int, Mapping[str, fl.Statistics]], seed: int
) -> Iterator[tuple[str, Pair]]:
    """By kind, what is added and what is taken away: the other task's adapters of both domains, or parts of them."""
    whole = halves.other[target], halves.other[source]
    yield "whole", whole
    yield "whole, the wrong way", (whole[1], whole[0])
    pool = fl.Pool(whole)
    for n, of_domain in inputs.items():
        data = fl.Statistics(of_domain[target].of | of_domain[source].of)
        parts = fl.decompose(pool, inputs=data, mu=MU)
        yield f"by inputs, {n} a domain", (parts.unique_of(pool.names[0]), parts.unique_of(pool.names[1]))
    for kind in ("permuted_inputs", "shuffled_tasks"):
        control = fl.control(parts, kind, seed=seed)
        yield f"control: {kind.replace('_', ' ')}, {n}", (control[pool.names[0]], control[pool.names[1]])


def one_seed(name: str, seed: int, options: Namespace, kept: Kept) -> Numbers:
    return dict(kept("pairs", None, lambda: of_pairs(halves_of(name, seed, options), seed)))


def of_pairs(halves: Halves, seed: int) -> Numbers:
    """Means over all pairs of domains: ``{kind: [[on rows that select, on test rows] of every strength]}``."""
    inputs = {n: halves.inputs(n) for n in INPUTS}
    found: dict[str, list[list[tuple[float, float]]]] = {}

    def score(adapter: fl.Adapter | None, domain: str) -> tuple[float, float]:
        return halves.accuracy(adapter, domain, select=True), halves.accuracy(adapter, domain, select=False)

    for target, source in permutations(halves.task, 2):
        task = halves.task[source]
        alone = {"base model": None, "the source's adapter": task, "trained on the target": halves.task[target]}
        for name, adapter in alone.items():
            found.setdefault(name, []).append([score(adapter, target)])
        for kind, (more, less) in pairs_of(halves, target, source, inputs, seed):
            moved = [fl.analogy(task, more, less, 1.0, c) for c in STRENGTHS]
            found.setdefault(kind, []).append([score(adapter, target) for adapter in moved])
    return {
        kind: [[statistics.fmean(column) for column in zip(*scores, strict=True)] for scores in zip(*of, strict=True)]
        for kind, of in found.items()
    }


def tables(data: Mapping[str, Numbers]) -> Results:
    """The best strength, one for all pairs, is that of the rows that select."""
    results = Results()
    for subject, found in ((subject, of) for subject, seeds in data["results"].items() for of in seeds.values()):
        best = {kind: max(scores, key=lambda score: score[0])[1] for kind, scores in found.items()}
        alone = found["the source's adapter"][0][1]
        for kind, scores in found.items():
            values = {"accuracy": best[kind], "gain over the source's": best[kind] - alone}
            if len(scores) > 1:
                values["− whole"] = best[kind] - best["whole"]
                values |= {f"gain, c = {c:g}": own[1] - alone for c, own in zip(STRENGTHS, scores, strict=True)}
            results.add(TABLES[subject], kind, values)
    return results


def main() -> None:
    options = arguments(__doc__, "analogy_by_inputs", {}, seeds=5, subjects=list(TABLES))
    subjects = available(options.subjects, options)
    results = tables(measured("analogy_by_inputs", subjects, SETTINGS, options, one_seed))
    results.show()
    (options.out / "results.md").write_text(results.markdown() + "\n")
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
