"""A second reader of adapter directories: plain ``json``, ``struct`` and ``numpy``, and PEFT's rule for the scaling.

It shares no code with fastlora. It is strict about what is damaged, and knows only the kinds of adapters that
``mutate.py`` starts from.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "base_model.model."
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1, "I64": 8, "U64": 8, "U16": 2, "I16": 2,
          "U32": 4, "I32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip
TORCH_KINDS = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}
Array = np.ndarray[Any, Any]


class Damaged(Exception):
    """The directory holds no adapter that can be read in one way only."""


def decode(raw: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype not in ("F64", "F32", "F16"):
        raise Damaged(f"dtype {dtype}")
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Damaged("a key is there twice")
    return found


def parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Damaged(str(error)) from None
    if not isinstance(value, dict):
        raise Damaged("no object")
    return value


def read_safetensors(path: Path) -> dict[str, Array]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise Damaged("the header is cut off")
    header, data = parse(raw[8 : 8 + length]), raw[8 + length :]
    tensors: dict[str, Array] = {}
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
        except (TypeError, KeyError, ValueError):
            raise Damaged(f"entry {name!r}") from None
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or dtype not in WIDTHS:
            raise Damaged(f"entry {name!r}")
        if end - start != count * WIDTHS[dtype] or end > len(data):
            raise Damaged(f"size of {name!r}")
        places.append((start, end))
        if any(name.endswith(p) for p in PARTS):
            tensors[name] = decode(data[start:end], dtype).reshape(shape)
    at = 0
    for start, end in sorted(places):
        if start != at:
            raise Damaged("tensors overlap or leave a gap")
        at = end
    if at != len(data):
        raise Damaged("bytes that belong to no tensor")
    return tensors


class _Unpickler(pickle.Unpickler):
    """Knows the three names that a plain ``torch.save`` of tensors uses."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if module == "torch" and name in TORCH_KINDS:
            return TORCH_KINDS[name]
        raise Damaged(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Array:
        return decode(self.archive.read(f"{self.folder}/data/{pid[2]}"), pid[1])

    @staticmethod
    def rebuild(storage: Array, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Array:
        if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= len(storage):
            raise Damaged("beyond its storage")
        strides = tuple(s * 8 for s in stride)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


def read_torch(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            folder = archive.namelist()[0].split("/")[0]
            values = _Unpickler(archive, folder).load()
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(str(error)) from None
    return {k: v for k, v in values.items() if any(k.endswith(p) for p in PARTS)}


def _matches(patterns: Mapping[str, Any], module: str) -> str | None:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def value_for(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    found = _matches(patterns or {}, module)
    return otherwise if found is None else (patterns or {})[found]


def read(directory: Path) -> dict[str, Array]:
    """Dense ``ΔW`` of every module, float64. Raises :class:`Damaged`."""
    config = parse((directory / "adapter_config.json").read_bytes())
    file = directory / "adapter_model.safetensors"
    tensors = read_safetensors(file) if file.exists() else read_torch(directory / "adapter_model.bin")
    modules: dict[str, dict[str, Array]] = {}
    for name, value in tensors.items():
        module = name
        while module.startswith(PREFIX):  # PEFT around PEFT
            module = module.removeprefix(PREFIX)
        suffix = next(p for p in PARTS if name.endswith(p))
        parts = modules.setdefault(module.removesuffix(suffix), {})
        if PARTS[suffix] in parts:
            raise Damaged(f"{name!r} is there twice")
        parts[PARTS[suffix]] = value
    found: dict[str, Array] = {}
    for module, parts in modules.items():
        if "A" not in parts or "B" not in parts:
            raise Damaged(f"{module!r} has one factor")
        found |= _dense(module, parts["B"], parts["A"], config)
    return found


def _dense(module: str, b: Array, a: Array, config: Mapping[str, Any]) -> dict[str, Array]:
    parameter = None
    for target in config.get("target_parameters") or []:
        owner, _, name = target.rpartition(".")
        if parameter is None and (module == owner or module.endswith(f".{owner}")):
            parameter = f"{module}.{name}"
    path = module if parameter is None else parameter
    rank = value_for(config.get("rank_pattern"), path, config["r"])
    alpha = value_for(config.get("alpha_pattern"), path, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    with np.errstate(all="ignore"):
        if parameter is not None:
            experts = a.shape[0] // rank
            right, left = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts)
            return {f"{parameter}[{e}]": scaling * (left[:, :, e] @ right[e]) for e in range(experts)}
        if a.shape[0] != rank or b.shape[1] != rank:
            raise Damaged(f"rank of {module!r}")
        return {module: scaling * (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1))}
