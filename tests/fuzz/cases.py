"""Adapter directories that can be damaged anywhere, built from bytes.

Neither fastlora nor safetensors takes part, so what they refuse to write is there too.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
CODES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
Pairs = list[tuple[str, Any]]


class Object(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, which may name a key twice."""


def dump(value: Any) -> str:
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


@dataclass
class Entry:
    """One tensor of a header, and its bytes."""

    name: str
    dtype: str
    shape: Any
    data: bytes
    offsets: Any = None
    more: Pairs = field(default_factory=list)


@dataclass
class Case:
    """An adapter directory that is being damaged; ``about`` must be named by a refusal."""

    seed: int
    template: str
    kind: str = ""
    config: Pairs = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    metadata: Any = None
    header_pad: int = 0
    about: str | None = None
    must_refuse: bool = False
    numbers: bool = True
    edit_config: Callable[[bytes], bytes] | None = None
    edit_weights: Callable[[bytes], bytes] | None = None
    special: Callable[[Path], None] | None = None

    def set(self, key: str, value: Any) -> None:
        self.config = [(k, v) for k, v in self.config if k != key] + [(key, value)]

    def weights(self) -> bytes:
        header, at = Object(), 0
        if self.metadata is not None:
            header.append(("__metadata__", self.metadata))
        for entry in self.entries:
            offsets = [at, at + len(entry.data)] if entry.offsets is None else entry.offsets
            pairs = [("dtype", entry.dtype), ("shape", entry.shape), ("data_offsets", offsets), *entry.more]
            header.append((entry.name, Object(pairs)))
            at += len(entry.data)
        text = dump(header).encode("utf-8", "surrogatepass") + b" " * self.header_pad
        return len(text).to_bytes(8, "little") + text + b"".join(e.data for e in self.entries)

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        config, weights = dump(Object(self.config)).encode("utf-8", "surrogatepass"), self.weights()
        (directory / CONFIG).write_bytes(self.edit_config(config) if self.edit_config else config)
        (directory / WEIGHTS).write_bytes(self.edit_weights(weights) if self.edit_weights else weights)
        if self.special:
            self.special(directory)


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(CODES[dtype]).tobytes()


def tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Entry:
    return Entry(PREFIX + name, dtype, list(shape), encode(rng.standard_normal(shape), dtype))


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {
        f"{Q}.lora_A.weight": (3, 6),
        f"{Q}.lora_B.weight": (7, 3),
        f"{V}.lora_A.weight": (3, 5),
        f"{V}.lora_B.weight": (4, 3),
    },
    "bias": {f"{Q}.lora_A.weight": (3, 6), f"{Q}.lora_B.weight": (7, 3), f"{Q}.lora_B.bias": (7,)},
    "conv": {"conv.lora_A.weight": (3, 2, 3, 3), "conv.lora_B.weight": (5, 3, 1, 1)},
    "embedding": {"tokens.lora_embedding_A": (3, 11), "tokens.lora_embedding_B": (6, 3)},
    "experts": {"mlp.experts.lora_A.weight": (6, 5), "mlp.experts.lora_B.weight": (4, 6)},
    "head": {f"{Q}.lora_A.weight": (3, 6), f"{Q}.lora_B.weight": (7, 3), "score.weight": (2, 4)},
}
FIELDS: dict[str, dict[str, Any]] = {
    "bias": {"lora_bias": True},
    "experts": {"target_parameters": ["mlp.experts.down_proj"]},
    "head": {"modules_to_save": ["score"]},
}
PLAIN: dict[str, Any] = {
    "alpha_pattern": {},
    "base_model_name_or_path": "made-up/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "lora_alpha": 6,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 3,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}


def healthy(template: str, seed: int, dtype: str = "F32") -> Case:
    """An adapter as PEFT writes it."""
    rng = np.random.default_rng(seed)
    config = list((PLAIN | FIELDS.get(template, {})).items())
    entries = [tensor(rng, name, shape, dtype) for name, shape in SHAPES[template].items()]
    return Case(seed, template, "healthy", config, entries, {"format": "pt"})


# Values that a field or a header may hold where something else belongs.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 2**31, 2**32 + 3, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 3.0,
    1e308, 1e-308, 1e200, -1e39, math.nan, math.inf, -math.inf, "", "3", "LORA", "\ud800", "\x00", "a\nb\x1b[31m",
    "ｆｕｌｌ", "é" * 500, [], [[]], [None], [1, 2], ["q_proj"], [[0, 1]], [[1, 2, 3]], {}, {"q_proj": 3},
    {"q_proj": -1}, {"": 3}, {".*": 3}, {"(": 3}, {"[": 1}, {"a" * 3000: 3}, {"q_proj": 1e300}, {"q_proj": "3"},
    {"x": {"y": {}}},
]  # fmt: skip


def flipped(raw: bytes, rng: random.Random, count: int, start: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(raw)
    for _ in range(count):
        at = rng.randrange(start, len(raw) if end is None else end)
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)
