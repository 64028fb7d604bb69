"""Plain factors of single files: shapes, dtypes, and the scaling that trainers mean, ``alpha / rank``.

Readers differ where alpha is missing or zero. Missing, it is the rank, as trainers and most readers have it. Zero is a
scale of 0 to most and of 1 to others, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.core.updates import LINEAR, Layout, Update
from fastlora.dialects.suffixes import Stored
from fastlora.errors import InputError

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
WIDER: Mapping[torch.dtype, torch.dtype] = {torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.bfloat16}
"""What holds every number of an 8-bit dtype."""
ALPHA_DTYPES = DTYPES | WIDER.keys() | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
MOST_ABOVE_SIDES = 2048
"""A rank above both sides of a module together is useless. Beyond this, matrices of rank × rank would be out of
proportion to the file."""
KERNELS = 3
"""Dimensions of a convolution's kernel, at most."""


Shape = tuple[int, ...]


def is_factor(part: str) -> bool:
    """Whether a part is one that only adapters have, and no number or norm that a whole model could have."""
    return part in ("down", "up", "mid", "diff", "diff_b") or part.startswith(("hada_", "lokr_"))


def weight_shape(shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the weight that a module's tensors change, by the shapes of these: of a convolution
    ``(out, in · kernel)``. ``None`` where they do not say it."""
    up, down = shapes.get("up"), shapes.get("down")
    try:
        if up is not None and down is not None:
            core = math.prod(shapes["mid"][2:]) if "mid" in shapes else 1
            return up[0], math.prod(down[1:]) * core
        if "hada_w1_a" in shapes:
            w_a, w_b, core_shape = shapes["hada_w1_a"], shapes["hada_w1_b"], shapes.get("hada_t1")
            return (w_a[0], math.prod(w_b[1:])) if core_shape is None else (w_a[1], w_b[1] * math.prod(core_shape[2:]))
        if any(part.startswith("lokr_") for part in shapes):
            return _kronecker_shape(shapes)
        if "diff" in shapes and len(shapes["diff"]) >= 2:
            return shapes["diff"][0], math.prod(shapes["diff"][1:])
    except (KeyError, IndexError):  # refused when it is read
        pass
    return None


def _kronecker_shape(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    out, columns = 1, 1
    for side in ("lokr_w1", "lokr_w2"):
        if side in shapes:
            n, m = shapes[side][0], math.prod(shapes[side][1:])
        elif side == "lokr_w2" and "lokr_t2" in shapes:
            n, m = shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1] * math.prod(shapes["lokr_t2"][2:])
        else:
            n, m = shapes[f"{side}_a"][0], math.prod(shapes[f"{side}_b"][1:])
        out, columns = out * n, columns * m
    return out, columns


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands, for messages: a file and what it calls a module."""

    file: Path
    stem: str

    def fail(self, what: str) -> InputError:
        """An error about this module."""
        return InputError(f"{self.file}: module {self.stem!r} {what}")


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of 8-bit dtypes in wider ones that hold the same numbers; others are not copied."""
    return {key: t.to(WIDER[t.dtype]) if t.dtype in WIDER else t for key, t in tensors.items()}


def read_alphas(modules: Mapping[str, Stored], file: Path) -> dict[str, float]:
    """The alpha of every module that has one, by stem: finite, of either sign, or zero."""
    stems: dict[torch.dtype, list[str]] = {}
    for stem, stored in modules.items():
        alpha = stored.parts.get("alpha")
        if alpha is None:
            continue
        if alpha.numel() != 1 or alpha.dim() > 1 or alpha.dtype not in ALPHA_DTYPES:
            raise InputError(
                f"{file}: tensor {stored.keys['alpha']!r} is {str(alpha.dtype)[6:]} {list(alpha.shape)}, needed is one "
                "number; correct the file"
            )
        stems.setdefault(alpha.dtype, []).append(stem)
    found: dict[str, float] = {}
    for owners in stems.values():
        # One call for all: asking every tensor takes ten times as long.
        values = torch.cat([modules[stem].parts["alpha"].reshape(1) for stem in owners])
        found |= zip(owners, values.to(torch.float64).tolist(), strict=True)
    for stem, value in found.items():
        if not math.isfinite(value):
            raise InputError(
                f"{file}: tensor {modules[stem].keys['alpha']!r} is {value}, so the scaling is unknown; correct it or "
                "train again"
            )
    return {stem: found[stem] for stem in modules if stem in found}


def check_tensor(key: str, tensor: Tensor, file: Path) -> None:
    """Refuses what cannot be computed with: other dtypes than those of weights, and tensors without elements."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{file}: tensor {key!r} is {str(tensor.dtype)[6:]}, needed is float32, float16, bfloat16 or float64 (or "
            "float8_e4m3fn, float8_e5m2); save the adapter in one of these"
        )
    if 0 in tensor.shape:
        raise InputError(f"{file}: tensor {key!r} is empty ({list(tensor.shape)}); save the adapter again")


def plain_update(stored: Stored, scaling: float, file: Path) -> Update:
    """``scaling · up · down`` of a module with ``down [r, in]`` and ``up [out, r]``, or with a kernel after them, on
    views of the stored tensors."""
    parts = stored.parts
    up, down = parts["up"], parts["down"]
    if up.dim() == down.dim() == 2:
        n, columns = up.shape
        r, m = down.shape
        if r == columns and 0 < r <= max(n + m, MOST_ABOVE_SIDES) and n and m:
            if up.dtype in DTYPES and down.dtype in DTYPES:
                return Update(Factor.of("B", up), Factor.of("A", down), scaling)
    check_tensor(stored.keys["up"], up, file)
    check_tensor(stored.keys["down"], down, file)
    _check_shapes(stored, up, down, file)
    kernel = tuple(down.shape[2:]) or (1,) * (up.dim() - 2)
    layout = Layout("conv", kernel=kernel) if kernel else LINEAR
    return Update(Factor.of("B", up.reshape(-1, down.shape[0])), Factor.of("A", down.flatten(1)), scaling, layout)


def _check_shapes(stored: Stored, up: Tensor, down: Tensor, file: Path) -> None:
    where = Place(file, stored.stem)
    found = f"has {stored.keys['down']!r} {list(down.shape)} and {stored.keys['up']!r} {list(up.shape)}"
    dims = range(2, 3 + KERNELS)
    if up.dim() not in dims or down.dim() not in dims or (up.dim() != down.dim() and min(up.dim(), down.dim()) != 2):
        raise where.fail(
            f"{found}; needed are [rank, in] and [out, rank], with the kernel after them for a convolution"
        )
    if any(k != 1 for k in up.shape[2:]):
        raise where.fail(f"{found}: a kernel belongs to the first of the two alone; save or download it again")
    r = down.shape[0]
    if up.shape[1] != r and r % up.shape[1] == 0 and down.dim() > 2:
        raise where.fail(f"{found}: a grouped convolution, whose update is no up · down; leave the module out")
    if up.shape[1] != r:
        raise where.fail(f"{found}: their ranks {r} and {up.shape[1]} must agree; save or download it again")
    if r > max(up.shape[0] + down[0].numel(), MOST_ABOVE_SIDES):
        raise where.fail(
            f"{found}: its rank is far above both sides of the module together, and above {MOST_ABOVE_SIDES}; store "
            "its update as one dense matrix (.diff)"
        )


def require_pairs(modules: Mapping[str, Stored], pairs: Sequence[tuple[str, str]], file: Path) -> None:
    """Refuses a module that has one part of a pair and not the other."""
    for stored in modules.values():
        parts = stored.parts
        for one, other in pairs:
            if (one in parts) != (other in parts):
                there, lacking = (one, other) if one in parts else (other, one)
                raise InputError(
                    f"{file}: tensor {stored.keys[there]!r} has no {lacking!r} beside it; the file is incomplete: save "
                    "or download the adapter again"
                )
