"""Where the modules of a model lie: in which layer, and what kind of module they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

ELSEWHERE = "outside of layers"


class Places(NamedTuple):
    """``layers`` and ``kinds`` by name; ``layer[m]`` and ``kind[m]`` are those of module ``m``, as indices."""

    layers: list[str]
    kinds: list[str]
    layer: list[int]
    kind: list[int]


def places(modules: Sequence[str]) -> Places:
    """The layer of a module is its path up to the first number, as weights by layer count it; its kind is what stands
    behind the last number that tells modules apart: ``attn.to_q`` of ``down.1.blocks.0.attn.to_q``, ``net.0.proj`` of
    ``blocks.3.net.0.proj`` where no module has another number in that place."""
    seen: dict[tuple[str, int], set[str]] = {}
    for module in modules:
        parts, template = module.split("."), _template(module)
        for at in _numbers(parts):
            seen.setdefault((template, at), set()).add(parts[at])
    found: list[tuple[str, str]] = []
    for module in modules:
        parts, template = module.split("."), _template(module)
        numbers = _numbers(parts)
        if not numbers:
            found.append((ELSEWHERE, module))
            continue
        first = numbers[0]
        last = max(at for at in numbers if at == first or len(seen[template, at]) > 1)
        found.append((".".join(parts[: first + 1]), ".".join(parts[last + 1 :]) or parts[last - 1]))
    layers = sorted({layer for layer, _ in found}, key=_natural)
    kinds = list(dict.fromkeys(kind for _, kind in found))
    of_layer, of_kind = ({name: i for i, name in enumerate(names)} for names in (layers, kinds))
    return Places(layers, kinds, [of_layer[layer] for layer, _ in found], [of_kind[kind] for _, kind in found])


def without_beginning(names: Sequence[str]) -> list[str]:
    """Dotted names without the leading parts that all have in common."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def _numbers(parts: Sequence[str]) -> list[int]:
    return [i for i, part in enumerate(parts) if part.isdecimal()]


def _template(module: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in module.split("."))


def _natural(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Layer 9 before layer 10; what is outside of layers at the end."""
    pieces = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
    return name == ELSEWHERE, pieces
