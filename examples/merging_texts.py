"""Multi-task merging of a small language model's LoRA adapters: coefficients swept or learned, with extra vectors.

    python examples/merging_texts.py [--out DIR] [--cache DIR] [--seeds 3] [--jobs 1] [--quick]

Four tasks of all-MiniLM-L6-v2, which texts.py describes. What is compared is in multitask.py; results:
docs/experiments.md. For full fine-tunes see merging.py.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from common import Results, arguments, console, of_seeds
from multitask import Setting, compare
from texts import NEEDED, Recipe, Texts

import fastlora as fl
from fastlora.coefficients.learned import entropy

TASKS = {"movie": 500, "amazon": 500, "trec": 1000, "spam": 500}  # training rows
VALIDATION = (1000, 1060)  # training rows that no adapter has seen, but for repeated ones of trec's rarest class
THRESHOLD = 0.15  # above what chance gives; at 0.3 some pairs share nothing, at the paper's 0.85 all
STEPS, BATCH, RATE = 25, 8, 3e-2


def setting_of(texts: Texts, steps: int, quick: bool) -> Setting:
    adapters = [texts.adapter(Recipe(task, "lora", steps, 0, rows), task) for task, rows in TASKS.items()]

    def scores(adapter: fl.Adapter) -> dict[str, float]:
        return {task: texts.accuracy(adapter, task) for task in TASKS}

    def on_validation(adapter: fl.Adapter) -> dict[str, float]:
        rows = {task: texts.task(task)[0][slice(*VALIDATION)] for task in TASKS}
        return {task: texts.accuracy(adapter, task, rows[task][: 8 if quick else None]) for task in TASKS}

    def entropy_of(task: str) -> Any:
        head = texts.task(task)[2]
        return lambda output, batch: entropy(texts.logits(output, batch, head))

    def batches(task: str) -> list[Mapping[str, torch.Tensor]]:
        rows, drawn = [text for text, _ in texts.task(task)[1]], random.Random(texts.seed)
        return [texts.tokens(drawn.sample(rows, BATCH)) for _ in range(1 if quick else STEPS)]

    return Setting(
        title=f"Four tasks in one model: LoRA, τ = {THRESHOLD}",
        pool=fl.Pool(adapters),
        score=scores,
        validate=on_validation,
        model=texts.model,
        batches={task: batches(task) for task in TASKS},
        loss={task: entropy_of(task) for task in TASKS},
        steps=1 if quick else STEPS,
        lr=RATE,
        threshold=THRESHOLD,
    )


def one_seed(seed: int, options: Namespace) -> Results:
    console.print(f"seed {seed}: training what is not in {options.cache}, then merging")
    results = Results()
    setting = setting_of(Texts(options.cache, options.test_rows, seed), options.steps, options.quick)
    for pair in fl.decompose(setting.pool, THRESHOLD, mode="pairs").reports:
        values = {"shared": pair.shared_directions, "by chance": pair.expected_by_chance}
        results.add(f"Directions shared by pairs at τ = {THRESHOLD}, of rank 8 in 18 modules", pair.title, values)
    compare(setting, seed, results)
    return results


def main() -> None:
    options = arguments(__doc__, "merging_texts", NEEDED)
    results = Results()
    for found in of_seeds(partial(one_seed, options=options), options):
        results.extend(found)
        results.save(options.out)  # of the seeds so far
    results.show()
    console.print(f"written: {options.out}/results.json, results.md")


if __name__ == "__main__":
    main()
