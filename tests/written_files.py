"""Adapters of tiny image models in memory, and what a single file says by the plainest rule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from builders import gaussian
from safetensors import safe_open
from torch import Tensor

import fastlora as fl
from fastlora.core.file_form import FileForm

Shapes = Mapping[str, tuple[int, ...]]
MIXED = (2, 3, 6)
SCALES = (0.5, 1.0, 3.0, 0.3)


def adapter_of(
    shapes: Shapes,
    family: str,
    *,
    ranks: Iterable[int] = MIXED,
    scales: Iterable[float] = SCALES,
    dtype: torch.dtype = torch.float32,
    style: str = "",
    format: str = "",
    size: float = 1.0,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> fl.Adapter:
    """Random factors for all modules, ranks and scales in turn."""
    ranks, scales = tuple(ranks), tuple(scales)
    tensors = {}
    for i, (module, (n, m, *kernel)) in enumerate(shapes.items()):
        r = ranks[i % len(ranks)]
        B = gaussian(n, r, *(1 for _ in kernel), seed=2 * i + 1000 * seed).mul(size).to(dtype)
        A = gaussian(r, m, *kernel, seed=2 * i + 1 + 1000 * seed).div(math.sqrt(m)).to(dtype)
        tensors[module] = B, A, scales[i % len(scales)]
    adapter = fl.Adapter.from_tensors(tensors, name="tiny")
    form = FileForm(format, family, style, metadata=metadata or {})
    return replace(adapter, base=replace(adapter.base, form=form))


def chosen(shapes: Shapes, wanted: str = "", without: str = "") -> dict[str, tuple[int, ...]]:
    """The modules whose names match a pattern, and not another one."""
    return {m: s for m, s in shapes.items() if re.search(wanted, m) and not (without and re.search(without, m))}


def contents(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, by the safetensors library."""
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})


def delta(tensors: Mapping[str, Tensor], stem: str, down: str, up: str) -> Tensor:
    """``alpha / rank · up · down`` of one module, ``[out, in·kernel]`` in float64: what every trainer means."""
    A, B = tensors[stem + down].double().flatten(1), tensors[stem + up].double().flatten(1)
    alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(len(A)))).double()
    return alpha / len(A) * B @ A


def error(found: Tensor, meant: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    meant = meant.double()
    return float((found.double().reshape(meant.shape) - meant).norm() / meant.norm())
