"""Hostile (IA)³ directories: whatever is done to one, it is read as a plain reader does, or refused in a sentence."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastlora as fl
from fastlora.errors import FastloraError

sys.path.append(str(Path(__file__).parent))

import oracle

COUNT = 1500
PREFIX = "base_model.model."
SHAPES = {"layers.0.key": [24, 1], "layers.0.up": [1, 16], "conv": [1, 6, 1, 1]}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
CONFIG = {"base_model_name_or_path": "made-up/model", "fan_in_fan_out": False, "feedforward_modules": ["up", "conv"],
          "peft_type": "IA3", "target_modules": ["key", "up", "conv"], "modules_to_save": None}  # fmt: skip
VALUES = [
    None,
    True,
    0,
    -1,
    3.5,
    "",
    "x",
    "up",
    ".*",
    "(",
    "(a*)*",
    "\x1b[2J",
    [],
    ["up"],
    [3],
    [""],
    {},
    {"a": 1},
    1e308,
]


Entry = dict[str, Any]
Header = dict[str, Entry]


def healthy(random_: random.Random) -> tuple[Entry, Header, bytes]:
    dtype = random_.choice(list(DTYPES))
    header: Header = {}
    data = b""
    for module, shape in SHAPES.items():
        values = np.array([random_.uniform(0.5, 1.5) for _ in range(math.prod(shape))]).astype(DTYPES[dtype])
        start, data = len(data), data + values.tobytes()
        header[f"{PREFIX}{module}.ia3_l"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    return dict(CONFIG), header, data


def change_config(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    key = r.choice([*config, "use_dora", "lora_alpha", "r"])
    config[key] = r.choice(VALUES)
    return data


def drop_field(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    del config[r.choice(list(config))]
    return data


def change_shape(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    entry = header[r.choice(list(header))]
    n = math.prod(entry["shape"])
    entry["shape"] = r.choice(
        [[n], [n, 1], [1, n], [1, n, 1], [2, n // 2], [n, 1, 1, 1], [1, 1, n, 1], [], [0, n], [-1, -n], [1 << 62, 4],
         [n, 1 << 40], [1] * 70, [n, 1.0], "n", [1 << 33, 1 << 31], [1, n, 1, 1, 1]]
    )  # fmt: skip
    return data


def change_offsets(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    entry = header[r.choice(list(header))]
    entry["data_offsets"] = [
        r.choice([*entry["data_offsets"], -1, 0, 4, 1 << 60]) for _ in range(r.choice([1, 2, 2, 3]))
    ]
    return data


def change_dtype(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    header[r.choice(list(header))]["dtype"] = r.choice(["F16", "BF16", "F32", "F64", "I32", "BOOL", "F8_E4M3", "Q4", 3])
    return data


def rename(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    key = r.choice(list(header))
    name = key.removeprefix(PREFIX)
    header[r.choice([name, f"{key}.weight", f"{PREFIX}x.lora_A.weight", "", "a\x1b[2J.ia3_l", "n" * 2000, ".ia3_l",
                     f"{PREFIX}{name}"])] = header.pop(key)  # fmt: skip
    return data


def poison(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    entry = header[r.choice(list(header))]
    if entry["dtype"] not in DTYPES:
        return data
    value = np.array([r.choice([math.nan, math.inf, -math.inf, 1e4])]).astype(DTYPES[entry["dtype"]]).tobytes()
    start = entry["data_offsets"][0]
    return data[:start] + value + data[start + len(value) :]


def cut(r: random.Random, config: Entry, header: Header, data: bytes) -> bytes:
    return data[: r.randrange(len(data) + 1)] if r.random() < 0.5 else data + b"\0" * r.randrange(1, 9)


CHANGES: list[Callable[[random.Random, Entry, Header, bytes], bytes]] = [
    change_config, drop_field, change_shape, change_offsets, change_dtype, rename, poison, cut,
]  # fmt: skip


def write(directory: Path, config: Entry, header: Header, data: bytes, r: random.Random, flips: int) -> None:
    text = json.dumps(header).encode()
    raw = bytearray(len(text).to_bytes(8, "little") + text + data)
    for _ in range(flips):
        raw[r.randrange(len(raw))] = r.randrange(256)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(raw)


def expected(directory: Path) -> dict[str, Any]:
    """Vectors as a plain reader finds them. Raises :class:`oracle.Damaged`."""
    raw = (directory / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = oracle.parse(raw[8 : 8 + length]), raw[8 + length :]
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        values = oracle.decode(data[start:end], entry["dtype"])
        assert values.size == math.prod(entry["shape"]) == max(entry["shape"])
        if name.endswith(".ia3_l"):
            found[name.removeprefix(PREFIX).removesuffix(".ia3_l")] = values
    return found


def test_mutations(tmp_path: Path) -> None:
    accepted = 0
    for seed in range(COUNT):
        r = random.Random(seed)
        config, header, data = healthy(r)
        flips = 0
        for _ in range(r.choice([0, 1, 1, 1, 2])):
            if r.random() < 0.15:
                flips = r.randrange(1, 4)
            else:
                try:
                    data = r.choice(CHANGES)(r, config, header, data)
                except (IndexError, KeyError, TypeError, ValueError):
                    continue  # one change made another one impossible
        write(tmp_path, config, header, data, r, flips)
        try:
            adapter = fl.load(tmp_path, "damaged")
        except FastloraError as error:
            assert str(error).isprintable() and len(str(error)) < 1500, seed
            continue
        accepted += 1
        assert isinstance(adapter, fl.IA3), seed
        want = expected(tmp_path)
        assert adapter.vectors.keys() == want.keys(), seed
        for module, values in want.items():
            assert np.array_equal(adapter.vector(module).numpy(), values), seed
            assert np.isfinite(values).all(), seed
    assert COUNT // 10 < accepted < COUNT // 2 + COUNT // 10


@pytest.mark.parametrize("seed", range(3))
def test_what_is_healthy_is_accepted(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    write(tmp_path, *healthy(r), r, 0)
    assert set(fl.load(tmp_path, "x").modules) == set(SHAPES)
