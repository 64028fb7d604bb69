"""Adapters of one made-up model, each of which stores some weights in another form.

A *weight* is what the model multiplies by, whatever its code calls it: ``0.qkv``, ``0.gate_up``, ``1.experts.2.down``.
An adapter has an update for some rows of some weights, and a directory that says it in one of the forms that versions
of the model's code and of PEFT have.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
SPELLINGS = {"w": ("w1", "w3", "w2"), "proj": ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Sizes:
    """Of the model: widths, and how many layers and experts."""

    hidden: int
    keys: int
    inner: int
    expert: int
    experts: int
    layers: int

    def parts(self) -> dict[str, list[tuple[str, int]]]:
        """``{weight of a layer: its parts in order, with their rows}``."""
        found = {
            "qkv": [("q_proj", self.hidden), ("k_proj", self.keys), ("v_proj", self.keys)],
            "gate_up": [("gate_proj", self.inner), ("up_proj", self.inner)],
            "down": [("down_proj", self.hidden)],
        }
        for e in range(self.experts):
            found[f"experts.{e}.gate_up"] = [("gate", self.expert), ("up", self.expert)]
            found[f"experts.{e}.down"] = [("down", self.hidden)]
        return found

    def width(self, weight: str) -> int:
        if weight.endswith("down"):
            return self.expert if "experts" in weight else self.inner
        return self.hidden


@dataclass
class Written:
    """One adapter: ``parts {(layer, weight, part): (B, A)}``, and the forms that it is written in."""

    label: str
    sizes: Sizes
    parts: dict[tuple[int, str, str], tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    prefix: str
    qkv: str
    gate_up: str
    experts: str
    version: str | None
    owner: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def about(self) -> str:
        return f"{self.label}: {self.qkv}, {self.gate_up}, experts {self.experts} ({self.version})"

    def deltas(self) -> dict[str, Tensor]:
        """``{layer.weight: ΔW}`` of the fused weights, in float64."""
        found = {}
        for layer in range(self.sizes.layers):
            for weight, parts in self.sizes.parts().items():
                rows, any_there = [], False
                for part, length in parts:
                    pair = self.parts.get((layer, weight, part))
                    any_there |= pair is not None
                    zero = torch.zeros(length, self.sizes.width(weight), dtype=torch.float64)
                    rows.append(
                        zero if pair is None else self.alpha / self.rank * (pair[0].double() @ pair[1].double())
                    )
                if any_there:
                    found[f"{layer}.{weight}"] = torch.cat(rows)
        return found

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        targets: set[str] = set()
        parameters: set[str] = set()
        for layer in range(self.sizes.layers):
            for weight, parts in self.sizes.parts().items():
                own = {p: self.parts[layer, weight, p] for p, _ in parts if (layer, weight, p) in self.parts}
                if "experts" not in weight and own:
                    targets |= set(self._dense(layer, weight, own))
            if any("experts" in key[1] for key in self.parts):
                targets |= self._experts(layer, parameters)
        fields = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "target_modules": sorted(targets)}
        if parameters:
            fields["target_parameters"] = sorted(parameters)
        if self.version is not None:
            fields["peft_version"] = self.version
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        save_file({k: t.contiguous() for k, t in self.tensors.items()}, folder / "adapter_model.safetensors")

    def _put(self, module: str, left: Tensor, right: Tensor) -> None:
        self.tensors[f"{PREFIX}{self.prefix}{module}.lora_A.weight"] = right
        self.tensors[f"{PREFIX}{self.prefix}{module}.lora_B.weight"] = left

    def _dense(self, layer: int, weight: str, own: dict[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
        """One weight of a layer: fused, with one ``A`` for all parts, or in parts."""
        where = f"layers.{layer}." + ("self_attn" if weight == "qkv" else "mlp")
        form = {"qkv": self.qkv, "gate_up": self.gate_up, "down": "split"}[weight]
        if form == "split":
            for part, pair in own.items():
                self._put(f"{where}.{part}", *pair)
                yield part
            return
        right = next(iter(own.values()))[1]
        lengths = dict(self.sizes.parts()[weight])
        left = torch.cat([own[p][0] if p in own else torch.zeros(n, self.rank) for p, n in lengths.items()])
        for part in own:
            self.parts[layer, weight, part] = own[part][0], right
        self._put(f"{where}.{form}", left, right)
        yield form

    def _experts(self, layer: int, parameters: set[str]) -> set[str]:
        where = f"layers.{layer}.{self.owner}.experts"
        if self.experts in SPELLINGS:
            ends = dict(zip(("gate", "up", "down"), SPELLINGS[self.experts], strict=True))
            for (at, weight, part), pair in self.parts.items():
                if at == layer and "experts" in weight:
                    self._put(f"{where}.{weight.split('.')[1]}.{ends[part]}", *pair)
            return set(ends.values())
        stacked = {p: self._stacked(layer, p) for p in ("gate_up", "down")}
        present = [p for p, pairs in stacked.items() if pairs]
        for p in present:
            pairs = [(a.mT, b.mT) if self.experts == "older" else (b, a) for b, a in stacked[p]]
            wrapper = where + (".base_layer" if p == "gate_up" and len(present) > 1 else "")
            self._put(wrapper, torch.stack([b for b, _ in pairs], 2).flatten(1), torch.cat([a for _, a in pairs]))
            parameters.add(f"experts.{p}_proj")
        return set()

    def _stacked(self, layer: int, parameter: str) -> list[tuple[Tensor, Tensor]]:
        """Factors of every expert for one parameter, zero where there is none; those of ``gate`` and ``up`` share A."""
        found = []
        if not any("experts" in weight and weight.endswith(parameter) for _, weight, _ in self.parts):
            return []
        for e in range(self.sizes.experts):
            weight = f"experts.{e}.{parameter}"
            parts = self.sizes.parts()[weight]
            own = {p: self.parts[layer, weight, p] for p, _ in parts if (layer, weight, p) in self.parts}
            right = next((a for _, a in own.values()), torch.zeros(self.rank, self.sizes.width(weight)))
            left = torch.cat([own[p][0] if p in own else torch.zeros(n, self.rank) for p, n in parts])
            for part in own:
                self.parts[layer, weight, part] = own[part][0], right
            found.append((left, right))
        return found


@dataclass
class Case:
    """Adapters of one model, with weights, and what is done with them."""

    seed: int
    verb: str
    adapters: list[Written]
    weights: list[float]

    def about(self) -> str:
        return f"{self.verb} ({'; '.join(a.about() for a in self.adapters)})"


VERBS = ("merge", "merge", "merge and save", "sum", "compose", "overlap", "decompose")


def make(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)
    verb = rng.choice(VERBS)
    inner = rng.choice((3, 4, 5))
    sizes = Sizes(
        hidden=rng.choice((4, 6, 8)), keys=rng.choice((2, 4)), inner=rng.choice((5, 7)), expert=inner,
        experts=rng.choice((0, 2, 3)), layers=rng.choice((1, 2)),
    )  # fmt: skip
    fused_qkv = rng.choice(("qkv_proj", "qkv_proj", "W_pack"))
    unsaid = rng.choice(("out-in", "older"))  # what no adapter of this case says
    count = 2 if verb in ("overlap", "decompose") else rng.choice((2, 2, 3))
    prefixes = rng.choice((("model.",), ("model.",), ("model.", "base.model.", "")))
    keep = 1.0 if verb == "overlap" else rng.choice((1.0, 0.7))  # cosines are of what both have
    adapters = [_adapter("abc"[i], sizes, rng, fused_qkv, unsaid, rng.choice(prefixes), keep) for i in range(count)]
    if sizes.experts and rng.random() < 0.4:  # experts alone, or one of their parameters: less tells the layout
        only = rng.choice(("experts", "experts", r"experts.*gate_up", r"experts.*down"))
        for adapter in adapters:
            adapter.parts = {key: pair for key, pair in adapter.parts.items() if re.search(only, key[1])}
        if not all(a.parts for a in adapters):
            return make(seed + 5_000_000)
    weights = [1.0] * count if verb in ("overlap", "decompose") else [rng.choice((1.0, 0.5, -2.0)) for _ in adapters]
    return Case(seed, verb, adapters, weights)


def _adapter(
    label: str, sizes: Sizes, rng: random.Random, fused_qkv: str, unsaid: str, prefix: str, keep: float
) -> Written:
    rank = rng.choice((1, 2, 3))
    parts = {}
    for layer in range(sizes.layers):
        for weight, found in sizes.parts().items():
            for part, length in found:
                if weight == "down" or rng.random() < keep:
                    shapes = (length, rank), (rank, sizes.width(weight))
                    parts[layer, weight, part] = tuple(_gaussian(s, rng) for s in shapes)
    experts, version = rng.choice(
        (("w", None), ("proj", None), ("fused", "0.19.1"), ("fused", "0.21.0"), ("older", "0.18.1"), (unsaid, None))
    )
    owner = "block_sparse_moe" if experts == "w" else "mlp"
    return Written(
        label, sizes, parts, rank, rng.choice((1.0, 3.0)), prefix, rng.choice((fused_qkv, "split")),
        rng.choice(("gate_up_proj", "split")), "fused" if experts == "out-in" else experts, version, owner,
    )  # type: ignore[arg-type]  # fmt: skip


def _gaussian(shape: tuple[int, int], rng: random.Random) -> Tensor:
    return torch.tensor([rng.gauss(0, 1) for _ in range(shape[0] * shape[1])]).reshape(shape)
