"""A small vision transformer on real handwritten digits, fully fine-tuned on one kind of picture after the other.

The 1,797 digits of 8×8 pixels ship with scikit-learn. A base model is trained briefly on a few of them in every domain,
so that all domains start above chance; a fine-tune sees more of them in one domain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastlora as fl

State = dict[str, Tensor]
SIDE, PATCH, WIDTH, DEPTH, HEADS = 8, 2, 64, 3, 4
BASE_ROWS, TUNE_ROWS, VALIDATION_ROWS = 160, 1137, 100  # the others, 400, are for tests
BASE_STEPS, TUNE_STEPS, BATCH = 500, 120, 64
BASE_RATE, TUNE_RATE = 3e-3, 1e-3

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
    """One seed: a split of the pictures, the base model and one task vector a domain."""

    def __init__(self, seed: int, shorter: int = 1) -> None:
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
        self.validation = {name: part[2] for name, part in parts.items()}
        self.test = {name: part[3] for name, part in parts.items()}
        torch.manual_seed(seed)
        self.model = Transformer()
        mixed = [torch.cat(t) for t in zip(*(part[0] for part in parts.values()), strict=True)]
        self._fit(mixed[0], mixed[1], BASE_STEPS // shorter, BASE_RATE, generator)
        self.base: State = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.vectors: dict[str, fl.TaskVector] = {}
        for name, part in parts.items():
            self.model.load_state_dict(self.base)
            self._fit(*part[1], TUNE_STEPS // shorter, TUNE_RATE, generator)
            self.vectors[name] = fl.task_vector(self.base, self.model.state_dict(), name)

    def _fit(self, x: Tensor, y: Tensor, steps: int, rate: float, generator: torch.Generator) -> None:
        optimiser = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
        for _ in range(steps):
            rows = torch.randint(len(y), (BATCH,), generator=generator)
            F.cross_entropy(self.model(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

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


def deltas_of(adapter: fl.Adapter) -> State:
    return {module: adapter.delta(module).float() for module in adapter.modules}
