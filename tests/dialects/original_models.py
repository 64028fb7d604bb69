"""Small models of every family as the original code has them: which weights there are, and where the modules of
diffusers lie in them. The names are those of the families' tables, which other tests hold against diffusers'
converters."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers_models import BUILDS, ENCODERS, modules, weighted
from torch import Tensor

import fastlora as fl
from fastlora.dialects.families import families

Shapes = dict[str, tuple[int, ...]]
TABLES = re.compile(r"embed_tokens|token_embedding|position_embedding|relative_attention|shared|embed_image|cond_type")
"""Embeddings, which single files have none of."""
ENCODERS_OF: Mapping[str, tuple[tuple[str, str], ...]] = {
    "sd15": (("text_encoder", "clip"),),
    "sdxl": (("text_encoder", "clip"), ("text_encoder_2", "clip")),
    "sd3": (("text_encoder", "clip"), ("text_encoder_2", "clip"), ("text_encoder_3", "t5")),
    "flux": (("text_encoder", "clip"), ("text_encoder_2", "t5")),
}
"""The text encoders that adapters of a family have."""
PROJECTED = {("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("sd3", "text_encoder_2")}
"""Those of CLIP that have a projection."""


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of a published model, 64 times smaller: what adds up, still does."""
    return tuple(size if size < 64 else size // 64 for size in shape)


@dataclass(frozen=True)
class Place:
    """Where a module lies in a weight: in ``rows`` from ``row`` on, its halves exchanged where ``swapped``."""

    weight: str
    row: int
    rows: int
    swapped: bool = False


@dataclass
class Model:
    """``shapes``: of the modules of diffusers. ``places``: theirs in the original code, of those that it has.
    ``weights``: the shapes of its weights; kernels are flattened."""

    family: str
    shapes: Shapes
    places: dict[str, Place] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, weight: str, module: str, row: int, total: int, swapped: bool = False) -> None:
        rows, *columns = self.shapes[module]
        self.places[module] = Place(weight, row, rows, swapped)
        self.weights[weight] = total, int(torch.tensor(columns).prod())

    def meant(self, adapter: fl.Adapter) -> dict[str, Tensor]:
        """``ΔW`` of every weight that an adapter changes: its modules in their rows, in float64."""
        found: dict[str, Tensor] = {}
        for module in adapter.modules:
            place = self.places[module]
            delta = adapter.delta(module).double().flatten(1)
            whole = found.setdefault(place.weight, torch.zeros(self.weights[place.weight], dtype=torch.float64))
            whole[place.row : place.row + place.rows] += halves(delta) if place.swapped else delta
        return found


def halves(delta: Tensor) -> Tensor:
    """(shift, scale) for (scale, shift)."""
    first, second = delta.chunk(2)
    return torch.cat([second, first])


@functools.cache
def model(name: str) -> Model:
    """A model of ``diffusers_models.BUILDS``, with its text encoders, whose weights have the names of transformers."""
    family = families()[BUILDS[name][0]]
    shapes = {path: small(s) for path, s in modules(name).items() if len(s) > 1 and not TABLES.search(path)}
    made = Model(family.name, shapes)
    for path, (rows, *columns) in shapes.items():
        original = family.original(path, (rows, columns[0]))
        if original is not None:
            made.add(original[0], path, 0, rows, original[1])
    for path in shapes:
        whole = None if path in made.places else family.whole(path)
        original = None if whole is None else family.original(whole)
        if whole is None or original is None:
            continue
        parts = family.parts(whole)
        assert parts is not None
        at = 0
        for part in parts:
            made.add(original[0], part, at, sum(shapes[p][0] for p in parts))
            at += shapes[part][0]
    for component, kind in ENCODERS_OF.get(family.name, ()):
        for path, shape in weighted(ENCODERS[kind]).items():
            is_there = path != "text_projection" or (family.name, component) in PROJECTED
            if len(shape) > 1 and is_there and not TABLES.search(path):
                inside = path if kind == "t5" or path.startswith("text_") else f"text_model.{path}"
                made.shapes[f"{component}.{inside}"] = small(shape)
                made.add(f"{component}.{inside}", f"{component}.{inside}", 0, small(shape)[0])
    return made
