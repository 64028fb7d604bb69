"""Adapters of one made-up model, written under many names and conventions.

A *place* is what a module is, whatever it is called: ``text/layers.0.self_attn.q_proj``. A *naming* says what the parts
of a model are called. An adapter has factors at some places, and a directory that says them in one of the ways in which
trainers and versions of a model's code do.

``CONVENTIONS`` is open: a function ``(adapter, random)`` that changes how an adapter is written, but not what it is.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."

Naming = Mapping[str, str]
"""``{part: what stands before its places}``; a part that is missing has no name in that version."""

NAMINGS: dict[str, list[Naming]] = {
    "language": [
        {"text": "model.", "head": "", "embed": "model."},
        {"text": "", "embed": ""},
        {"text": "base.model.", "head": "base.", "embed": "base.model."},
        {"text": "model.language_model.", "head": "", "embed": "model.language_model."},
        {"text": "language_model.model.", "head": "language_model.", "embed": "language_model.model."},
        {"text": "transformer.", "head": "", "embed": "transformer."},
        {"text": "policy.model.", "head": "policy.", "embed": "policy.model."},
    ],
    "vision-language": [
        {"text": "model.", "vision": "visual.", "head": "", "merger": "visual."},
        {"text": "model.language_model.", "vision": "model.visual.", "head": "", "merger": "model.visual."},
        {"text": "language_model.model.", "vision": "vision_tower.", "head": "language_model.", "merger": ""},
        {"text": "model.language_model.", "vision": "model.vision_tower.", "head": "", "merger": "model."},
        {"text": "model.text_model.", "vision": "model.vision_model.", "head": "", "merger": "model."},
    ],
    "two towers": [
        {"text": "text_model.encoder.", "vision": "vision_model.encoder."},
        {"text": "clip.text_model.encoder.", "vision": "clip.vision_model.encoder."},
        {"text": "model.text_model.encoder.", "vision": "model.vision_model.encoder."},
        {"text": "encoder."},
    ],
    "encoder and decoder": [
        {"text": "model.encoder.", "vision": "model.decoder.", "head": ""},
        {"text": "encoder.", "vision": "decoder.", "head": ""},
        {"text": "model.model.encoder.", "vision": "model.model.decoder.", "head": "model."},
        {"text": "encoder.encoder.", "vision": "decoder.decoder."},
    ],
    "pipeline": [
        {"text": "text_encoder.text_model.encoder.", "vision": "text_encoder_2.text_model.encoder.", "unet": "unet."},
        {"text": "text_encoder.encoder.", "vision": "text_encoder_2.encoder.", "unet": "unet."},
        {"text": "text_model.encoder.", "unet": ""},
    ],
}

PLACES: dict[str, list[str]] = {
    "text": [f"layers.{i}.{m}" for i in range(3) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")],
    "vision": [f"layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj")],
    "unet": [f"down_blocks.{i}.attentions.{j}.to_q" for i in range(2) for j in range(2)],
    "head": ["lm_head"],
    "embed": ["embed_tokens"],
    "merger": ["merger.mlp.0", "merger.mlp.2"],
}
EXPERTS = [f"layers.{i}.mlp.experts.{e}.w1" for i in range(2) for e in range(3)]


@dataclass
class Written:
    """One adapter: what it is (``factors`` by place), and how it is written."""

    label: str
    naming: Naming
    factors: dict[str, tuple[Tensor, Tensor]]
    shifts: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 2
    alpha: float = 3.0
    config: dict[str, Any] = field(default_factory=dict)
    rename_key: list[Callable[[str], str]] = field(default_factory=list)
    is_vectors: bool = False
    """(IA)³: the first column of ``B`` is ``l``, which scales outputs; ``ΔW`` is then ``l − 1``."""
    inner: bool = False
    pickled: bool = False
    beside: dict[str, Tensor] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)

    def name(self, place: str) -> str | None:
        """The path of a place in this adapter's model."""
        part, _, rest = place.partition("/")
        return None if part not in self.naming else self.naming[part] + rest

    def scaling(self, place: str) -> float:
        """LoRA's ``α / r``, of a module that the configuration names with its own ``α``."""
        pattern: Mapping[str, float] = self.config.get("alpha_pattern", {})
        own = next((a for end, a in pattern.items() if place.endswith(end)), self.alpha)
        return own / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)

    def deltas(self) -> dict[str, Tensor]:
        """``ΔW`` at every place, dense, in float64."""
        if self.is_vectors:
            return {p: b[:, :1].double() - 1.0 for p, (b, _) in self.factors.items()}
        return {p: self.scaling(p) * (b.double() @ a.double()) for p, (b, a) in self.factors.items()}

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, (left, right) in self.factors.items():
            start = f"{PREFIX}{self.name(place)}"
            if self.is_vectors:
                found[f"{start}.ia3_l"] = left[:, :1]
                continue
            if place.startswith("embed/"):
                found |= {f"{start}.lora_embedding_A": right, f"{start}.lora_embedding_B": left}
                continue
            found |= {f"{start}.lora_A.weight": right, f"{start}.lora_B.weight": left}
            if place in self.shifts:
                found[f"{start}.lora_B.bias"] = self.shifts[place]
        found |= self.beside
        for change in self.rename_key:
            found = {change(key): tensor for key, tensor in found.items()}
        return found

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        fields: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": []}
        fields = (
            fields
            if self.is_vectors
            else {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, **self.config}
        )
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        tensors = {k: t.contiguous() for k, t in self.tensors().items()}
        if self.pickled:
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            save_file(tensors, folder / "adapter_model.safetensors")


Convention = Callable[[Written, random.Random], None]


def _inserted(segment: str) -> Callable[[str], str]:
    """A wrapper of every layer."""
    return lambda key: re.sub(r"((?:layers|blocks|down_blocks)\.\d+)\.", rf"\1.{segment}.", key, count=1)


def wrapped(adapter: Written, rng: random.Random) -> None:
    """Segments of one or two wrappers."""
    for _ in range(rng.choice((1, 1, 2))):
        segment = rng.choice(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"))
        where = rng.choice(("start", "model", "layer"))
        if where == "layer" and segment != "module":
            adapter.rename_key.append(_inserted(segment))
        elif where == "model":
            adapter.rename_key.append(lambda key, s=segment: key.replace(PREFIX, f"{PREFIX}{s}.", 1))  # type: ignore[misc]
        else:
            adapter.rename_key.append(lambda key, s=segment: f"{s}.{key}")  # type: ignore[misc]
        adapter.about.append(f"{segment} at the {where}")


def wrapped_twice_by_peft(adapter: Written, rng: random.Random) -> None:
    adapter.rename_key.append(lambda key: PREFIX + key)
    adapter.about.append("PEFT twice")


def without_prefix(adapter: Written, rng: random.Random) -> None:
    adapter.rename_key.append(lambda key: key.removeprefix(PREFIX))
    adapter.about.append("no prefix")


def inner_module(adapter: Written, rng: random.Random) -> None:
    """``module`` inside paths, which may be a wrapper's."""
    adapter.rename_key.append(_inserted("module"))
    adapter.inner = True
    adapter.about.append("module inside")


def own_name(adapter: Written, rng: random.Random) -> None:
    """The adapter's name in its keys, as in the state of a running model; sometimes all of that state."""
    name = rng.choice(("default", "a", "my-adapter", "lora"))
    if rng.random() < 0.3 and adapter.factors:
        for i, (place, (b, a)) in enumerate(adapter.factors.items()):
            weight = torch.full((b.shape[0], a.shape[1]), float(i))
            key = f"{PREFIX}{adapter.name(place)}.base_layer.weight"
            adapter.beside[key] = weight.mT if place.startswith("embed/") else weight
        adapter.beside[f"{PREFIX}norm.weight"] = torch.ones(3)
        adapter.about.append("a whole state")
    adapter.rename_key.insert(
        0, lambda key: re.sub(r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l)(?=\.|$)", rf"\1.{name}", key)
    )
    adapter.about.append(f"called {name} in keys")


def pickled(adapter: Written, rng: random.Random) -> None:
    adapter.pickled = True
    adapter.about.append("pickled")


def scaled(adapter: Written, rng: random.Random) -> None:
    """Scalings by module and rsLoRA."""
    adapter.config["alpha_pattern"] = {"q_proj": 5.0, "layers.1.self_attn.v_proj": 7.0}
    adapter.config["use_rslora"] = rng.random() < 0.5
    adapter.about.append("patterns")


def shifted(adapter: Written, rng: random.Random) -> None:
    """Biases beside the factors (``lora_bias``)."""
    if any(p.startswith("embed/") for p in adapter.factors):
        return
    for place, (left, _) in adapter.factors.items():
        adapter.shifts[place] = torch.tensor([rng.gauss(0, 1) for _ in range(left.shape[0])])
    adapter.config["lora_bias"] = True
    adapter.about.append("biases")


CONVENTIONS: list[tuple[float, Convention]] = [
    (0.3, wrapped), (0.08, wrapped_twice_by_peft), (0.05, without_prefix), (0.06, inner_module), (0.2, own_name),
    (0.05, pickled), (0.25, scaled), (0.06, shifted),
]  # fmt: skip
"""How often each is used, alone or with others."""


@dataclass
class Case:
    """Adapters of one model, with weights, and what is done with them."""

    seed: int
    family: str
    verb: str
    adapters: list[Written]
    weights: list[float]

    def about(self) -> str:
        how = [", ".join(a.about) for a in self.adapters if a.about]
        return f"{self.verb} of {self.family}" + (f" ({'; '.join(how)})" if how else "")


VERBS = ("merge", "merge", "sum", "compose", "overlap", "modulate", "add")


def make(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)
    family = rng.choice(list(NAMINGS))
    verb = rng.choice(VERBS)
    count = 2 if verb in ("overlap", "modulate") else rng.choice((2, 2, 2, 3))
    flat = rng.random() < 0.5  # all of one shape, so that shapes tell nothing apart
    experts = rng.random() < 0.15
    namings = NAMINGS[family] if rng.random() < 0.8 else [rng.choice(NAMINGS[family])]
    adapters = []
    for i in range(count):
        naming = rng.choice(namings)
        places = _places(naming, rng, experts)
        shapes = {p: (7, 5) if flat else _shape(p) for p in places}
        seeds = seed if verb in ("overlap", "modulate") else seed + 7919 * (i + 1)
        adapter = Written("abc"[i], naming, {p: _factors(p, s, seeds) for p, s in shapes.items()})
        for share, convention in CONVENTIONS:
            if rng.random() < share and not (verb in ("overlap", "modulate") and convention in (scaled, shifted)):
                convention(adapter, rng)
        adapters.append(adapter)
    weights = [1.0] * count if verb == "overlap" else [rng.choice((1.0, 0.5, -0.25, 2.0)) for _ in adapters]
    rng.shuffle(adapters)
    if verb in ("sum", "add", "compose") and rng.random() < 0.15:
        verb = f"{verb} IA3"
        for adapter in adapters:
            adapter.is_vectors, adapter.shifts = True, {}
    return Case(seed, family, verb, adapters, weights)


def _places(naming: Naming, rng: random.Random, experts: bool) -> list[str]:
    """All places of some parts, or some of them: attention alone, the first layers."""
    parts = [p for p in naming if rng.random() < 0.75] or [next(iter(naming))]
    found = [f"{part}/{place}" for part in parts for place in PLACES[part]]
    if experts and "text" in parts:
        found += [f"text/{place}" for place in EXPERTS]
    keep: Sequence[str] = found
    how = rng.random()
    if how < 0.15:
        keep = [p for p in found if "mlp" not in p]
    elif how < 0.3:
        keep = [p for p in found if "self_attn" not in p]
    elif how < 0.45:
        layer = rng.randrange(3)
        keep = [p for p in found if not re.search(r"layers\.(\d)", p) or f"layers.{layer}." not in p]
    return list(keep or found)


def _shape(place: str) -> tuple[int, int]:
    part, _, rest = place.partition("/")
    wide = {"text": 6, "vision": 5, "unet": 4, "head": 6, "embed": 9, "merger": 5}[part]
    return (8 if rest.endswith("up_proj") else 6 if part == "embed" else 7), wide


def _factors(place: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    own = random.Random(f"{seed} {place}")
    n, m = shape
    left = torch.tensor([own.gauss(0, 1) for _ in range(2 * n)]).reshape(n, 2)
    return left, torch.tensor([own.gauss(0, 1) for _ in range(2 * m)]).reshape(2, m)
