"""A small vision transformer on real handwritten digits, fine-tuned on one kind of picture after the other: all of its
weights, or LoRA adapters.

The 1,797 digits of 8×8 pixels ship with scikit-learn. A base model is trained briefly on a few of them in every domain,
so that all domains start above chance; a fine-tune sees more of them in one domain.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastlora as fl

State = dict[str, Tensor]
SIDE, PATCH, WIDTH, DEPTH, HEADS = 8, 2, 64, 3, 4
BASE_ROWS, TUNE_ROWS, VALIDATION_ROWS = 160, 1137, 100  # the others, 400, are for tests
BASE_STEPS, TUNE_STEPS, BATCH = 500, 120, 64
BASE_RATE, TUNE_RATE = 3e-3, 1e-3
LORA_RANK, LORA_STEPS, LORA_RATE, LORA_LAYERS = 4, 160, 5e-3, ["qkv", "out", "up", "down"]
NEEDED = {"sklearn": "scikit-learn", "peft": "peft"}
POOLS = {"full": "full fine-tunes", "lora": "LoRA"}

DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "inverted": lambda x, _: 1 - x,
    "noisy": lambda x, generator: x + 0.2 * torch.randn(x.shape, generator=generator),
    "shifted": lambda x, _: x.roll((1, -1), (1, 2)),
    "mirrored": lambda x, _: x.flip(2),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patches(x) + self.places)).mean(1))


class Digits:
    """One seed: a split of the pictures, the base model, and of every domain a task vector and a LoRA adapter.

    cache: a folder that keeps the base model and the LoRA adapters. Then there are no task vectors, and every adapter
    is drawn by its name, so that it is the same whatever else was trained.
    """

    def __init__(self, seed: int, shorter: int = 1, cache: Path | None = None) -> None:
        from sklearn.datasets import load_digits

        generator = torch.Generator().manual_seed(seed)
        pictures, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=generator)
        x, y = torch.tensor(pictures, dtype=torch.float32).view(-1, SIDE, SIDE)[order] / 16, torch.tensor(labels)[order]
        sizes = [BASE_ROWS, TUNE_ROWS, VALIDATION_ROWS, len(y) - BASE_ROWS - TUNE_ROWS - VALIDATION_ROWS]
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {
            name: list(zip(change(x, generator).split(sizes), y.split(sizes), strict=True))
            for name, change in DOMAINS.items()
        }
        self.tune = {name: part[1] for name, part in parts.items()}
        self.validation = {name: part[2] for name, part in parts.items()}
        self.test = {name: part[3] for name, part in parts.items()}
        torch.manual_seed(seed)
        self.model = Transformer()
        self.seed, self.shorter = seed, shorter
        self.temporary = tempfile.TemporaryDirectory()  # fastlora maps the files that peft writes
        self.folder = Path(self.temporary.name) if cache is None else cache / f"digits-split{seed}-shorter{shorter}"
        mixed = [torch.cat(t) for t in zip(*(part[0] for part in parts.values()), strict=True)]
        kept = self.folder / "base.safetensors"
        if kept.exists():
            self.model.load_state_dict(load_file(kept))
        else:
            _fit(self.model, mixed[0], mixed[1], BASE_STEPS // shorter, BASE_RATE, generator)
        self.base: State = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.vectors: dict[str, fl.TaskVector] = {}
        self.lora: dict[str, fl.Adapter] = {}
        if cache is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                save_file(self.base, kept)
            self.lora = {name: self.drawn_lora(name, name) for name in parts}
            return
        for name, part in parts.items():
            self.model.load_state_dict(self.base)
            _fit(self.model, *part[1], TUNE_STEPS // shorter, TUNE_RATE, generator)
            self.vectors[name] = fl.task_vector(self.base, self.model.state_dict(), name)
        self.model.load_state_dict(self.base)
        for name, part in parts.items():
            self.lora[name] = self._lora(name, *part[1], LORA_STEPS // shorter, generator)

    def drawn_lora(self, name: str, domain: str, classes: Sequence[int] = range(10)) -> fl.Adapter:
        """The adapter of a domain that is kept under a name, by which its start and its batches are drawn; of some
        classes, which are no part of the name."""
        if not (self.folder / name / "adapter_model.safetensors").exists():
            number = zlib.crc32(f"{self.seed} {name}".encode())
            torch.manual_seed(number)
            generator = torch.Generator().manual_seed(number)
            x, y = of_classes(*self.tune[domain], classes)
            return self._lora(name, x, y, LORA_STEPS // self.shorter, generator)
        return self._loaded(name)

    def _lora(self, name: str, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> fl.Adapter:
        from peft import LoraConfig, get_peft_model

        warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_LAYERS)
        model = get_peft_model(copy.deepcopy(self.model), config)
        _fit(model, x, y, steps, LORA_RATE, generator)
        part = self.folder / f"{name}.part"
        model.save_pretrained(part)
        part.rename(self.folder / name)
        return self._loaded(name)

    def _loaded(self, name: str) -> fl.Adapter:
        adapter = fl.load(self.folder / name, name)
        assert isinstance(adapter, fl.Adapter)
        return adapter

    def adapters(self, kind: str) -> dict[str, fl.Adapter]:
        """By domain, the LoRA adapters, or the weight matrices of the task vectors at full rank."""
        if kind == "lora":
            return self.lora
        return {name: vector.extract(energy=1.0) for name, vector in self.vectors.items()}

    def state(self, deltas: State, strength: float = 1.0) -> State:
        """The base model's weights with ``strength`` times the changes of modules' weights."""
        return self.base | {
            f"{module}.weight": self.base[f"{module}.weight"] + strength * delta for module, delta in deltas.items()
        }

    @torch.no_grad()
    def accuracy(self, state: State, domain: str, *, test: bool = True) -> float:
        x, y = (self.test if test else self.validation)[domain]
        scores = functional_call(self.model.eval(), state, (x,))
        return float((scores.argmax(1) == y).double().mean())

    def mean_accuracy(self, state: State, domains: Iterable[str], *, test: bool = True) -> float:
        return statistics.fmean(self.accuracy(state, domain, test=test) for domain in domains)


def of_classes(x: Tensor, y: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows of some classes."""
    rows = torch.isin(y, torch.tensor(classes))
    return x[rows], y[rows]


def _fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float, generator: torch.Generator) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def deltas_of(adapter: fl.Adapter) -> State:
    return {module: adapter.delta(module).float() for module in adapter.modules}
