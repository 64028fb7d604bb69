"""PEM's settings on a small real model: what adding, negating and transferring adapters does to accuracy.

    python examples/pem.py [--out DIR] [--cache DIR] [--seeds 3] [--quick]

LoRA and (IA)³ adapters of all-MiniLM-L6-v2, trained on sentiment and question types. Results: docs/experiments.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from common import Results, arguments, console
from curves import Curve, Curves, equal_forgetting, plot_curves
from safetensors.torch import load_file, save_file
from texts import NEEDED, Element, Recipe, Texts

import fastlora as fl

KINDS = {"lora": "LoRA", "ia3": "(IA)³"}
TARGETS = {"movie": "trec", "trec": "movie"}  # what is forgotten, and what should not be
STRENGTHS = [0.25, 0.5, 1.0, 1.5, 2.0]
LEVELS = {"movie": [0.53, 0.50], "trec": [0.45, 0.35, 0.25]}  # accuracies that forgetting is compared at
TRANSFERS = [-0.5, 0.25, 0.5, 1.0]


class Setting:
    """One kind of adapter, one split."""

    def __init__(self, texts: Texts, kind: str, steps: int) -> None:
        def trained(task: str, first: int, last: int, steps: int = steps, objective: str = "labels") -> Element:
            return texts.adapter(Recipe(task, kind, steps, first, last, objective))

        self.texts, self.kind = texts, KINDS[kind]
        self.movie_a, self.movie_b = trained("movie", 0, 500), trained("movie", 500, 1000)
        self.trec, self.amazon = trained("trec", 0, 1000), trained("amazon", 0, 500)
        half = max(1, steps // 2)  # each step is two passes
        self.movie_texts = trained("movie", 0, 1000, half, "texts")
        self.amazon_texts = trained("amazon", 0, 1000, half, "texts")
        self.recipes = {
            "movie": Recipe("movie", kind, steps, 0, 500),
            "trec": Recipe("trec", kind, steps, 0, 1000),
        }

    def semantics(self) -> list[str]:
        """Both differ for LoRA only."""
        return ["exact", "pem"] if self.kind == "LoRA" else ["exact"]

    def scores(self, element: Element | None, *tasks: str) -> dict[str, float]:
        return {task: self.texts.accuracy(element, task) for task in tasks}


def generalise(s: Setting, results: Results) -> None:
    """The mean of two adapters that saw disjoint rows of one task."""
    table = "Distribution generalisation: movie reviews"
    results.add(table, "base model", {s.kind: s.texts.accuracy(None, "movie")})
    alone = [s.texts.accuracy(a, "movie") for a in (s.movie_a, s.movie_b)]
    results.add(table, "each alone, mean of two", {s.kind: statistics.fmean(alone)})
    for semantics in s.semantics():
        merged = fl.add([s.movie_a, s.movie_b], [0.5, 0.5], semantics=semantics)
        accuracy = s.texts.accuracy(merged, "movie")
        results.add(table, f"mean of adapters, {semantics}", {s.kind: accuracy})
        results.add(table, f"gain over each alone, {semantics}", {s.kind: accuracy - statistics.fmean(alone)})


def multitask(s: Setting, results: Results) -> None:
    """Two tasks in one adapter."""
    table = f"Two tasks in one adapter: {s.kind}"
    results.add(table, "base model", s.scores(None, "movie", "trec"))
    alone = {"movie": s.scores(s.movie_a, "movie", "trec"), "trec": s.scores(s.trec, "movie", "trec")}
    for task, found in alone.items():
        results.add(table, f"{task} alone", found)
    merged = {"sum, exact": fl.compose("movie + trec", {"movie": s.movie_a, "trec": s.trec})}
    for semantics in s.semantics():
        merged[f"mean, {semantics}"] = fl.add([s.movie_a, s.trec], [0.5, 0.5], semantics=semantics)
    for name, element in merged.items():
        found = s.scores(element, "movie", "trec")
        gains = {f"{task}: gain over its own": found[task] - alone[task][task] for task in found}
        results.add(table, name, found | gains)


def permuted(path: Path, seed: int, out: Path) -> Element:
    """A control of the same norms and spectra: the adapter with its input columns ((IA)³: entries) in random order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = tensor[:, torch.randperm(tensor.shape[1], generator=generator)].contiguous()
        elif "ia3_l" in name:
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].reshape(tensor.shape).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    found = fl.load(out)
    assert isinstance(found, Element)
    return found


def curve(s: Setting, adapter: Element, target: str, control: str) -> Curve:
    found = [(s.texts.accuracy(None, target), s.texts.accuracy(None, control))]
    for strength in STRENGTHS:
        scores = s.scores(fl.negate(adapter, strength), target, control)
        found.append((scores[target], scores[control]))
    return found


def unlearn(s: Setting, results: Results, curves: dict[str, Curves]) -> None:
    """Negation, against the negation of a permuted adapter."""
    for target, control in TARGETS.items():
        trained = s.texts.path(s.recipes[target])
        adapters = {s.kind: s.texts.adapter(s.recipes[target])}
        label = f"{s.kind}, permuted"
        adapters[label] = permuted(trained, s.texts.seed, s.texts.cache / "permuted" / trained.name)
        for name, adapter in adapters.items():
            found = curve(s, adapter, target, control)
            curves.setdefault(target, {}).setdefault(name, []).append(found)
            for strength, (forgotten, kept) in zip([0.0, *STRENGTHS], found, strict=True):
                row = f"λ = {strength:g}"
                results.add(
                    f"Negation of {target}: {name}",
                    row,
                    {f"{target} (target)": forgotten, f"{control} (control)": kept},
                )


def transfer(s: Setting, results: Results) -> None:
    """A classifier of product reviews, moved to movie reviews by adapters that saw texts without labels."""
    table = "Domain transfer to movie reviews, without their labels"
    results.add(table, "base model", {s.kind: s.texts.accuracy(None, "movie")})
    classifier = s.texts.accuracy(s.amazon, "movie")
    results.add(table, "amazon classifier", {s.kind: classifier})
    known = {"task": s.amazon, "target": s.movie_texts, "source": s.amazon_texts}
    moved = {}
    for c1 in TRANSFERS:
        row = f"analogy, exact, c₁ = {c1:g}" + (" (the wrong way)" if c1 < 0 else "")
        moved[row] = fl.compose("analogy(task, target, source, 1, c)", known, numbers={"c": c1})
    if "pem" in s.semantics():
        moved["analogy, pem, c₀ = c₁ = ½"] = fl.compose("analogy(task, target, source, semantics=pem)", known)
    for row, element in moved.items():
        accuracy = s.texts.accuracy(element, "movie")
        results.add(table, row, {s.kind: accuracy, f"{s.kind}: gain over the classifier": accuracy - classifier})
    results.add(table, "trained on movie labels", {s.kind: s.texts.accuracy(s.movie_a, "movie")})


def main() -> None:
    options = arguments(__doc__, "pem", NEEDED)
    results = Results()
    curves: dict[str, Curves] = {}
    for seed in range(options.seeds):
        texts = Texts(options.cache, options.test_rows, seed)
        for kind in KINDS:
            console.print(f"seed {seed}, {KINDS[kind]}")
            setting = Setting(texts, kind, options.steps)
            generalise(setting, results)
            multitask(setting, results)
            unlearn(setting, results, curves)
            transfer(setting, results)
    results.show()
    lines = []
    for target, found in curves.items():
        lines += [f"### Accuracy on {TARGETS[target]} where {target} has fallen to a level", ""]
        lines += [*equal_forgetting(found, LEVELS[target], against="LoRA"), ""]
    console.print("\n".join(lines), markup=False)
    results.save(options.out, "\n".join(lines))
    labels = [(f"{target}: to be forgotten", f"{TARGETS[target]}: to be kept") for target in curves]
    plot_curves(curves, labels, options.out / "negation.png")
    console.print(f"written: {options.out}/results.json, results.md, negation.png")


if __name__ == "__main__":
    main()
