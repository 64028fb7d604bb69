"""Single files for the tiny models of ``pipelines.py`` in any spelling, and the change that each of them means."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlora.dialects.families import family_named
from fastlora.dialects.family import Family

FACTORS = {
    "down": (".lora_down.weight", ".lora_up.weight"),
    "A": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "dot": (".lora.down.weight", ".lora.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
"""How ``A`` and ``B`` are called."""
TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

Alphas = Callable[[int, int], float | None]
"""From the number of a module and its rank to its alpha."""
HALF: Alphas = lambda i, rank: rank / 2  # noqa: E731
RANK: Alphas = lambda i, rank: float(rank)  # noqa: E731
ONE: Alphas = lambda i, rank: 6.0  # noqa: E731
EACH: Alphas = lambda i, rank: (1.0, 5.0, 0.75)[i % 3]  # noqa: E731
MISSING: Alphas = lambda i, rank: 3.0 if i % 2 else None  # noqa: E731
NONE: Alphas = lambda i, rank: None  # noqa: E731


@dataclass(frozen=True)
class Spelling:
    """``prefix``: of the denoiser. ``original``: names of the original code. ``factors``: of :data:`FACTORS`.
    ``folded``: scales are inside ``B``. ``text``: prefixes of text encoders, by component."""

    prefix: str
    original: bool = False
    factors: str = "down"
    folded: bool = False
    text: dict[str, str] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        return self.prefix.startswith(("lora_", "lycoris_"))


KOHYA = Spelling("lora_unet_", text=TEXT)
ORIGINAL = Spelling("lora_unet_", True, text=TEXT)
COMFY = Spelling("diffusion_model.", True, "A", True)
UNET = Spelling("unet.", factors="A", folded=True, text={t: f"{t}." for t in TEXT})
TRANSFORMER = replace(UNET, prefix="transformer.")


@dataclass
class Written:
    """``tensors`` and ``metadata`` of a file, and the ``ΔW`` that it means, by module, in float64."""

    tensors: dict[str, Tensor]
    meant: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        path = folder / "lora.safetensors"
        save_file(self.tensors, path, self.metadata or None)
        return path


def written(
    family: str,
    spelling: Spelling,
    shapes: dict[str, tuple[int, ...]],
    alphas: Alphas = HALF,
    ranks: Sequence[int] = (3,),
    *,
    only: str = "",
    without: str = "$nothing",
    metadata: dict[str, str] | None = None,
) -> Written:
    """A file with the modules whose names contain the pattern ``only`` and not ``without``."""
    table = family_named(family)
    assert table is not None
    chosen = {m: s for m, s in shapes.items() if re.search(only, m) and not re.search(without, m)}
    if spelling.original:
        chosen = _fused(table, chosen)
    result = Written({}, {}, dict(metadata or {}))
    components = {"": spelling.prefix, **spelling.text}
    there = [m for m in chosen if _component(m) in components]
    for i, module in enumerate(there):
        rank = ranks[i % len(ranks)]
        alpha = alphas(i, rank)
        scale = 1.0 if alpha is None else alpha / rank
        shape = chosen[module]
        down = _random(f"{module} A", rank, *shape[1:])
        up = _random(f"{module} B", shape[0], rank, *(1,) * (len(shape) - 2))
        stem = _stem(table, module, spelling, components[_component(module)], shape)
        _add(result.tensors, stem, spelling, up, down, alpha, scale)
        delta = scale * (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
        original = table.original(module, shape[:2]) if spelling.original and not _component(module) else None
        if original is not None and original[1]:
            delta = torch.cat(list(reversed(delta.chunk(2))))
        result.meant[module] = delta
    return result


def _add(
    tensors: dict[str, Tensor],
    stem: str,
    spelling: Spelling,
    up: Tensor,
    down: Tensor,
    alpha: float | None,
    scale: float,
) -> None:
    a, b = FACTORS[spelling.factors]
    if spelling.factors == "processor":
        stem = stem.replace(".to_", ".processor.to_").removesuffix(".0")
    tensors[f"{stem}{a}"] = down
    tensors[f"{stem}{b}"] = up * scale if spelling.folded else up
    if alpha is not None and not spelling.folded:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)


def _component(module: str) -> str:
    return module.partition(".")[0] if module.startswith("text_encoder") else ""


def _stem(table: Family, module: str, spelling: Spelling, prefix: str, shape: tuple[int, ...]) -> str:
    component = _component(module)
    path = module.removeprefix(f"{component}.") if component else module
    if spelling.original and not component:
        found = table.original(path, shape[:2])
        path = path if found is None else found[0]
    return prefix + (path.replace(".", "_") if spelling.is_flat else path)


def _fused(table: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The modules with those in one that the original code has in one."""
    found: dict[str, tuple[int, ...]] = {}
    for module, shape in shapes.items():
        whole = None
        if not _component(module) and table.original(module, shape[:2]) is None:
            whole = next((w for w in table.wholes(module) if table.original(w) is not None), None)
        parts = table.parts(whole) if whole is not None else None
        if parts is None:
            found[module] = shape
        elif all(part in shapes for part in parts):
            found[whole or module] = (sum(shapes[part][0] for part in parts), *shape[1:])
    return found


def _random(what: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(what.encode()))
    return torch.randn(*shape, generator=generator)
