"""A second reader of single files, as plain as can be: names by one expression, ``ΔW`` by its formula in float64.

It knows nothing of models: modules are called by their stems. It is for the fuzzer alone.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = re.compile(
    r"(?P<stem>.+?)(?:\.lora_(?P<a>down|up|mid)\.weight|\.lora_(?P<b>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
    r"|\.lora_B(?:\.(?!weight$|bias$)[^.]+)?\.(?P<bias>bias)|[._]lora\.(?P<c>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<d>down|up)\.weight"
    r"|\.(?P<e>alpha|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?|diff|diff_b|w_norm|b_norm|set_weight|dora_scale"
    r"|magnitude|lora_magnitude_vector(?:\.weight)?|scalar|scale))"
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Damaged(Exception):
    """Nothing that could be read."""


def split(name: str) -> tuple[str, str] | None:
    """``(stem, part)``; ``None`` for a name that is not known."""
    match = SUFFIX.fullmatch(name)
    if match is None:
        return None
    found = {k: v for k, v in match.groupdict().items() if v is not None}
    part = next(v for k, v in found.items() if k != "stem")
    return found["stem"], {"A": "down", "B": "up"}.get(part, part)


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file."""
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True), {}
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    try:
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    except ValueError:
        raise Damaged("the header is no JSON") from None
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None or last - first != math.prod(shape) * dtype.itemsize or last > len(data):
            raise Damaged(f"the size of {name!r}")
        bytes_of = torch.frombuffer(bytearray(data[first:last]) or bytearray(1), dtype=torch.uint8)[: last - first]
        found[name] = bytes_of.view(dtype).reshape(shape)
    return found, metadata


def modules_of(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """``{stem: {part: tensor}}``."""
    tensors, metadata = tensors_of(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = split(name)
        if found is None:
            if name.startswith("bundle_emb."):
                continue
            raise Damaged(f"{name!r} is not known")
        modules.setdefault(found[0], {}).setdefault(found[1], tensor)
    return modules, metadata


def is_lycoris(path: Path, stem: str) -> bool:
    """Whether a module is no plain LoRA."""
    parts = modules_of(path)[0][stem]
    return "up" not in parts or "mid" in parts


def read(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """``{stem: ΔW}`` in float64, kernels flattened, of all modules whose weight changes. ``names``: ``{stem: path}``,
    for the patterns of metadata."""
    modules, metadata = modules_of(path)
    with_alpha = any("alpha" in parts for parts in modules.values())
    fields = json.loads(metadata.get("lora_adapter_metadata", "{}")) if not with_alpha else {}
    deltas = {}
    for stem, parts in modules.items():
        wide = {name: t.double() for name, t in parts.items()}
        delta, rank = _delta(stem, wide)
        if delta is None:
            continue
        scale = float(wide["alpha"]) / rank if rank and "alpha" in wide else 1.0
        if rank and isinstance(fields, dict) and not stem.startswith(("text_encoder", "lora_te")):
            scale *= _said(fields, names.get(stem, stem))
        deltas[stem] = scale * delta
    return deltas


def _said(fields: dict[str, object], name: str) -> float:
    alpha, rank = (_value(fields, key, of, name) for key, of in (("lora_alpha", "alpha"), ("r", "rank")))
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or not rank:
        return 1.0
    return alpha / (rank**0.5 if fields.get("transformer.use_rslora") else rank)


def _value(fields: dict[str, object], key: str, of: str, name: str) -> object:
    patterns = fields.get(f"transformer.{of}_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return fields.get(f"transformer.{key}")


def _delta(stem: str, t: dict[str, Tensor]) -> tuple[Tensor | None, int]:
    """``ΔW`` without its scale, and what alpha is divided by."""
    if "mid" in t:
        r = t["down"].shape[0]
        return torch.einsum("om,mn...,ni->oi...", t["up"].flatten(1), t["mid"], t["down"].flatten(1)).flatten(1), r
    if "up" in t:
        return t["up"].flatten(1) @ t["down"].flatten(1), t["down"].shape[0]
    if "hada_w1_a" in t:
        sides = [_core(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in (1, 2)]
        return (sides[0] * sides[1]).flatten(1), t["hada_w1_b"].shape[0]
    if any(k.startswith("lokr_") for k in t):
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else _core(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
        size = t["lokr_w2_b"] if "lokr_w2_b" in t else t.get("lokr_w1_b")
        return torch.kron(w1.contiguous(), w2.flatten(1).contiguous()), 0 if size is None else size.shape[0]
    if "diff" in t and t["diff"].dim() > 1:
        return t["diff"].flatten(1), 0
    return None, 0


def _core(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    return a @ b.flatten(1) if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)
