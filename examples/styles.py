"""A tiny Flux transformer that draws synthetic pictures, and LoRA adapters of four drawing styles.

A picture is drawn with one ink on one paper. Its *content* is a shape at a place, which the model is told as two words.
Its *style* is the colours and the texture: plain, hatched, an outline, or two of these at once. The base model draws
plain grey pictures. An adapter is trained on one style, with the base model frozen.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastlora as fl

State = dict[str, Tensor]
NEEDED = {"diffusers": "diffusers", "peft": "peft"}
SIDE, PATCH = 16, 4
ACROSS = SIDE // PATCH
SHAPES, CENTRES, RADIUS = 4, [5.0, 10.0], 4.8
WORD_WIDTH, HEADS, HEAD_WIDTH = 16, 6, 16
BASE_STEPS, BASE_RATE, LORA_STEPS, LORA_RATE, BATCH = 400, 5e-3, 200, 5e-3, 64
LORA_RANK = 4
# The projections of attention and the two layers of every MLP; not the model's own last layer, which is proj_out too.
LORA_LAYERS = r".*blocks\..*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"
EULER_STEPS = 8
LEAST_TIME = 0.4  # errors at less noise weigh no more than at this much


def _shapes() -> Tensor:
    """``[contents, SIDE, SIDE]`` of zeros and ones: every shape (disc, square, triangle, cross) at every place."""
    grid = torch.arange(SIDE, dtype=torch.float32)
    found = []
    for shape, top, left in product(range(SHAPES), CENTRES, CENTRES):
        y, x = (grid - top)[:, None].expand(SIDE, SIDE), (grid - left)[None, :].expand(SIDE, SIDE)
        inside = [
            x.square() + y.square() < RADIUS**2,
            torch.maximum(x.abs(), y.abs()) < RADIUS - 0.6,
            (y < RADIUS - 0.9) & (x.abs() < (y + RADIUS) / 1.9),
            (torch.minimum(x.abs(), y.abs()) < 1.8) & (torch.maximum(x.abs(), y.abs()) < RADIUS),
        ][shape]
        found.append(inside.float())
    return torch.stack(found)


def _inks() -> tuple[Tensor, list[str]]:
    """``[contents, textures, SIDE, SIDE]`` of zeros and ones, where there is ink; and the names of the textures."""
    shapes, grid = _shapes(), torch.arange(SIDE)
    y, x = grid[:, None].expand(SIDE, SIDE), grid[None, :].expand(SIDE, SIDE)
    inner = -F.max_pool2d(-F.pad(shapes, (1, 1, 1, 1))[:, None], 3, 1)[:, 0]
    lines = {"diagonal": (x + y) % 4 < 2, "level": y % 4 < 2, "upright": x % 4 < 2}
    single = {name: shapes * line for name, line in lines.items()} | {"outline": shapes - inner}
    pairs = list(combinations(single, 2))
    both = {f"{a} over {b}": torch.maximum(single[a], single[b]) for a, b in pairs}
    crossings = {f"{a} within {b}": torch.minimum(single[a], single[b]) for a, b in pairs}
    textures = {"plain": shapes} | single | both | crossings
    return torch.stack(list(textures.values()), 1), list(textures)


INKS, TEXTURES = _inks()
CONTENTS = len(INKS)


@dataclass(frozen=True)
class Style:
    """Colours of paper and ink in [0, 1], how much they vary (a standard deviation), and the texture."""

    paper: tuple[float, float, float]
    ink: tuple[float, float, float]
    texture: str
    varies: float = 0.03


PENCIL = Style((0.60, 0.60, 0.60), (0.40, 0.40, 0.40), "plain", 0.10)  # what the base model draws
# Three are hatchings on warm paper, the fourth is glows in the dark.
STYLES = {
    "etching": Style((0.93, 0.86, 0.72), (0.22, 0.14, 0.12), "diagonal"),
    "sanguine": Style((0.95, 0.85, 0.70), (0.68, 0.22, 0.12), "level"),
    "sepia": Style((0.90, 0.84, 0.72), (0.42, 0.30, 0.14), "upright"),
    "neon": Style((0.06, 0.05, 0.18), (0.20, 0.95, 0.85), "plain"),
}
APART = "neon"
ALIKE = [name for name in STYLES if name != APART]


def draw(content: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Pictures ``[k, 3, SIDE, SIDE]`` in [0, 1] of the contents ``[k]``."""
    colours = torch.tensor([style.paper, style.ink])[:, None]
    noise = torch.randn(2, len(content), 3, generator=generator)
    paper, ink = (colours + style.varies * noise).clamp(0, 1)[..., None, None]
    where = INKS[content, TEXTURES.index(style.texture)][:, None]
    return paper * (1 - where) + ink * where


def distance_from_drawings(pictures: Tensor) -> Tensor:
    """``[contents, k]``: how far the pictures ``[k, 3, SIDE, SIDE]`` are from a clean drawing of every content.

    A clean drawing has one colour in [0, 1] where there is ink and one where there is none, in the nearest of all
    textures. The nearest colour is the mean of the pixels, cut to [0, 1]. The distance is a root mean square.
    """
    x, ink = pictures.double().flatten(2), INKS.double().flatten(0, 1).flatten(1)
    squares = torch.zeros(len(ink), len(x), dtype=x.dtype)
    for where in (ink, 1 - ink):
        pixels = where.sum(1)[:, None, None]
        total = torch.einsum("dp,kcp->dkc", where, x)
        colour = (total / pixels).clamp(0, 1)
        around = torch.einsum("dp,kcp->dkc", where, x.square()) - 2 * colour * total + pixels * colour.square()
        squares += around.sum(2)
    return (squares / x[0].numel()).clamp(min=0).sqrt().unflatten(0, INKS.shape[:2]).amin(1)


class Painter:
    """One seed: the base model, and of every style a LoRA adapter."""

    def __init__(self, seed: int, shorter: int = 1) -> None:
        from diffusers import FluxTransformer2DModel
        from diffusers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = FluxTransformer2DModel(
            in_channels=3 * PATCH**2 + 2 * ACROSS,
            out_channels=3 * PATCH**2,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=HEADS,
            joint_attention_dim=WORD_WIDTH,
            pooled_projection_dim=WORD_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        self.places = torch.cartesian_prod(torch.arange(1), torch.arange(ACROSS), torch.arange(ACROSS))
        # Row and column of a patch, beside its pixels: what rotary positions alone teach so small a model too slowly.
        self.canvas = F.one_hot(self.places[:, 1:], ACROSS).flatten(1).float()
        words = torch.Generator().manual_seed(0)
        self.words = [torch.randn(count, WORD_WIDTH, generator=words) for count in (SHAPES, len(CENTRES) ** 2)]
        self.folder = tempfile.TemporaryDirectory()  # fastlora maps the files that diffusers writes
        self._fit(self.model, PENCIL, BASE_STEPS // shorter, BASE_RATE)
        self.base: State = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.adapters = {name: self._lora(name, LORA_STEPS // shorter) for name in STYLES}

    def _lora(self, name: str, steps: int) -> fl.Adapter:
        """Trained and saved by diffusers, in a file as its pipelines load it; read by fastlora."""
        from peft import LoraConfig

        model = copy.deepcopy(self.model).requires_grad_(False)
        model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_LAYERS))
        self._fit(model, STYLES[name], steps, LORA_RATE)
        model.save_lora_adapter(Path(self.folder.name) / name)
        adapter = fl.load(Path(self.folder.name) / name / "pytorch_lora_weights.safetensors", name)
        assert isinstance(adapter, fl.Adapter)
        return adapter

    def _arguments(self, tokens: Tensor, times: Tensor, content: Tensor) -> dict[str, object]:
        """The model's arguments: noisy pictures, how noisy they are in [0, 1], and the two words of the content."""
        words = [table[i] for table, i in zip(self.words, (content // 4, content % 4), strict=True)]
        return {
            "hidden_states": torch.cat([tokens, self.canvas.expand(len(tokens), -1, -1)], 2),
            "timestep": times,
            "encoder_hidden_states": torch.stack(words, 1),
            "pooled_projections": (words[0] + words[1]) / 2**0.5,
            "img_ids": self.places.float(),
            "txt_ids": torch.zeros(2, 3),
            "return_dict": False,
        }

    def _fit(self, model: nn.Module, style: Style, steps: int, rate: float) -> None:
        """Flow matching: of ``x_t = (1−t)·x + t·noise`` the model says ``x``, so that the velocity is ``(x_t−x)/t``."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            content = torch.randint(CONTENTS, (BATCH,), generator=self.generator)
            x = to_tokens(draw(content, style, self.generator))
            noise = torch.randn(x.shape, generator=self.generator)
            t = torch.randn(BATCH, generator=self.generator).sigmoid()
            said = model(**self._arguments(torch.lerp(x, noise, t[:, None, None]), t, content))[0]
            weight = 1 / t.clamp(min=LEAST_TIME)[:, None, None]
            F.mse_loss(weight * said, weight * x).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def state(self, deltas: State, strength: float = 1.0) -> State:
        """The base model's weights with ``strength`` times the changes of modules' weights."""
        return self.base | {f"{m}.weight": self.base[f"{m}.weight"] + strength * delta for m, delta in deltas.items()}

    def paint(self, state: State, content: Tensor, noise: Tensor) -> Tensor:
        """:meth:`paint_with` the base model under other weights."""
        return self.paint_with(lambda **arguments: functional_call(self.model, state, (), arguments), content, noise)

    @torch.no_grad()
    def paint_with(self, model: Callable[..., Any], content: Tensor, noise: Tensor) -> Tensor:
        """Pictures ``[k, 3, SIDE, SIDE]`` of the contents ``[k]``, from the noise ``[k, 3, SIDE, SIDE]`` in Euler's
        steps. They are not cut to [0, 1]."""
        x = F.pixel_unshuffle(noise, PATCH).flatten(2).mT
        for t, after in pairwise(torch.linspace(1, 0, EULER_STEPS + 1).tolist()):
            said = model(**self._arguments(x, torch.full((len(x),), t), content))[0]
            x = x + (after - t) / t * (x - said)
        return to_pictures(x)


def to_tokens(pictures: Tensor) -> Tensor:
    """``[k, 3, SIDE, SIDE]`` in [0, 1] to patches ``[k, ACROSS², 3·PATCH²]`` in [-1, 1]."""
    return F.pixel_unshuffle(2 * pictures - 1, PATCH).flatten(2).mT


def to_pictures(tokens: Tensor) -> Tensor:
    return (F.pixel_shuffle(tokens.mT.unflatten(2, (ACROSS, ACROSS)), PATCH) + 1) / 2


def deltas_of(adapter: fl.Adapter) -> State:
    return {module: adapter.delta(module).float() for module in adapter.modules}
