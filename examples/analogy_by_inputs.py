"""A task in a domain that it was never trained in, by analogy: adapters are moved whole, or by parts that inputs tell.

    pip install scikit-learn peft
    python examples/analogy_by_inputs.py [--seeds 5] [--out DIR] [--quick]

The task is to tell the digits 5 to 9 apart, the other task 0 to 4, in domains of digits. The task in the target domain
is ``task(source) + c·(other(target) − other(source))``; nothing is trained on 5 to 9 of the target. Results:
docs/experiments.md.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from common import Results, arguments, console
from digits import DOMAINS, NEEDED, Digits, State, deltas_of, of_classes
from subjects import PLACES, TEST_STEP, Numbers, measured
from torch.func import functional_call

import fastlora as fl

TASK, OTHER = range(5, 10), range(5)
STRENGTHS = [0.25, 0.5, 1.0, 1.5]  # c
INPUTS = [64, 256]  # of the other task, unlabelled; the controls have the most
MU = 1.0
TABLE = "Analogy, ordered pairs of four domains of digits"
Pair = tuple[fl.Adapter, fl.Adapter]


class Halves:
    """A seed's adapters of both tasks by domain, and inputs of the other one, by adapter."""

    def __init__(self, found: Digits) -> None:
        self.digits = found
        self.task, self.other = (
            {d: found.drawn_lora(f"{d}_{of[0]}-{of[-1]}", d, of) for d in DOMAINS} for of in (TASK, OTHER)
        )

    def inputs(self, n: int) -> dict[str, fl.Statistics]:
        """By domain, of ``n`` pictures in the base model."""
        self.digits.model.load_state_dict(self.digits.base)
        found = {}
        for domain, adapter in self.other.items():
            pictures, _ = of_classes(*self.digits.tune[domain], OTHER)
            batches = {adapter.name: [pictures[:n]]}
            found[domain] = fl.statistics(self.digits.model, batches, adapter.modules, tokens=PLACES)
        return found

    @torch.no_grad()
    def accuracy(self, state: State, domain: str, *, select: bool) -> float:
        """Of the task among its classes, on rows that select or on test rows."""
        x, y = self.digits.validation[domain] if select else (t[::TEST_STEP] for t in self.digits.test[domain])
        x, y = of_classes(x, y, TASK)
        scores = functional_call(self.digits.model.eval(), state, (x,))[:, list(TASK)]
        return float((scores.argmax(1) + TASK[0] == y).double().mean())


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


def one_seed(_: str, seed: int, options: Namespace) -> Numbers:
    """Means over all pairs of domains: ``{kind: [[on rows that select, on test rows] of every strength]}``."""
    halves = Halves(Digits(seed, 20 if options.quick else 1, options.cache))
    inputs = {n: halves.inputs(n) for n in INPUTS}
    found: dict[str, list[list[tuple[float, float]]]] = {}

    def score(adapter: fl.Adapter | None, domain: str) -> tuple[float, float]:
        digits = halves.digits
        state = digits.base if adapter is None else digits.state(deltas_of(adapter))
        return halves.accuracy(state, domain, select=True), halves.accuracy(state, domain, select=False)

    for target, source in permutations(DOMAINS, 2):
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
    for found in data["results"]["digits"].values():
        best = {kind: max(scores, key=lambda score: score[0])[1] for kind, scores in found.items()}
        alone = found["the source's adapter"][0][1]
        for kind, scores in found.items():
            values = {"accuracy": best[kind], "gain over the source's": best[kind] - alone}
            if len(scores) > 1:
                values["− whole"] = best[kind] - best["whole"]
                values |= {f"gain, c = {c:g}": own[1] - alone for c, own in zip(STRENGTHS, scores, strict=True)}
            results.add(TABLE, kind, values)
    return results


def main() -> None:
    options = arguments(__doc__, "analogy_by_inputs", NEEDED, seeds=5)
    settings = {"strengths": STRENGTHS, "inputs": INPUTS, "μ": MU, "task": [*TASK], "other task": [*OTHER]}
    results = tables(measured("analogy_by_inputs", ["digits"], settings, options, one_seed))
    results.show()
    (options.out / "results.md").write_text(results.markdown() + "\n")
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
