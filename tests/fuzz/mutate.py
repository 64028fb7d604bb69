"""Damaged and hostile adapter directories, each made from one number.

Everything is built from bytes: neither fastlora nor safetensors takes part, so what they refuse to write is there too.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
KNOWN_FIELDS = [*PLAIN, "rank_pattern", "alpha_pattern", "r", "lora_alpha", "use_qalora", "kasa_config", "eva_config",
                "exclude_modules", "trainable_token_indices", "ensure_weight_tying", "velora_config", "peft_version",
                "layers_pattern", "unknown_field", "loftq_config", "arrow_config", "use_bdlora", "inference_mode",
                "megatron_config", "monteclora_config", "alora_invocation_tokens"]  # fmt: skip
SLOW_PATTERNS = [
    "(a+)+$x", "(.*)*x", "(.*.*.*.*.*.*.*.*)*!", "(.|.)*!", "(a|aa|.)+!", "((.*)*)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!",
    "(.?){500}!", "(.{0,200}){200}!", "(.*){1000000}!", r"(\w+\.?)+!", r"(?:(?:\w|\.)+)+!", r"([\w.]+)*\1!",
    "(?=(.*)*!).*", "(?!(.+)+!)zz", "(?i:(A+)+)$!", r"(?P<n>.*)(?P=n)*!", "(((((((((.?)?)?)?)?)?)?)?)?)*!", "(.*?)*?!",
]  # fmt: skip
FAST_PATTERNS = {
    "q_proj": 1, ".*q_proj": 1, r"layers\.\d+\..*": 1, "^model.*": 1, "(q|v)_proj": 1, "x": 1,
    "self_attn.(q_proj|k)": 1,
    r"model\.(layers)\.[0-9]+\.(self_attn|mlp)\.[qv]_proj": 1, r"layers\.(0|1).*_proj$": 1, "(?!model).*": 1, ".+": 1,
    "(?:.*attn.*){1,2}": 1, "self.attn.v.proj": 1, ".q_proj": 1, "attn.q_proj": 1, "proj": 1,
    "onv": 1, "[^.]+_proj": 1, r"\w{2,9}": 1, "(a|b|)*q_proj": 1, r"(?<=\.)q_proj.*.*": 1,
    "conv|tokens": 1,
}  # fmt: skip


def odd_field(case: Case, rng: random.Random) -> None:
    key = rng.choice(KNOWN_FIELDS)
    case.set(key, rng.choice(ODD))


def several_fields(case: Case, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 5)):
        odd_field(case, rng)


def missing_field(case: Case, rng: random.Random) -> None:
    gone = rng.choice(case.config)[0]
    case.config = [(k, v) for k, v in case.config if k != gone]
    if gone in ("r", "lora_alpha", "peft_type"):
        case.about, case.must_refuse = gone, True


def repeated_field(case: Case, rng: random.Random) -> None:
    key, value = rng.choice(case.config)
    case.config.insert(rng.randrange(len(case.config) + 1), (key, rng.choice([value, rng.choice(ODD)])))
    case.about, case.must_refuse = key, True


def repeated_pattern(case: Case, rng: random.Random) -> None:
    key = rng.choice(["rank_pattern", "alpha_pattern"])
    case.set(key, Object([("q_proj", 3), ("q_proj", rng.choice([3, 5]))]))
    case.about, case.must_refuse = "q_proj", True


def valid_numbers(case: Case, rng: random.Random) -> None:
    case.set("lora_alpha", rng.choice([1, 0.25, 7.5, -3, 1e-30, 1e30, 10**15, 0]))
    case.set("use_rslora", rng.random() < 0.5)
    case.set("alpha_pattern", {p: rng.choice([2, 0.5, 9]) for p in rng.sample(sorted(FAST_PATTERNS), 2)})
    if rng.random() < 0.5:
        case.set("rank_pattern", {p: 3 for p in rng.sample(sorted(FAST_PATTERNS), 2)})


def slow_pattern(case: Case, rng: random.Random) -> None:
    key = rng.choice(["rank_pattern", "alpha_pattern"])
    case.set(key, {rng.choice(SLOW_PATTERNS): 3})
    long = rng.choice(["", "a." * rng.choice([1, 20, 100]), "a" * rng.choice([30, 300])])
    for entry in case.entries:
        entry.name = entry.name.replace(PREFIX, PREFIX + long)
    case.numbers = False


def nested_config(case: Case, rng: random.Random) -> None:
    depth = rng.choice([50, 300, 900, 990, 2000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    key = rng.choice(KNOWN_FIELDS)
    text = opening * depth + ("1" if opening != "[" else "") + closing * depth
    case.edit_config = lambda raw: raw[:-1] + f",{json.dumps(key)}:{text}}}".encode()


def config_bytes(case: Case, rng: random.Random) -> None:
    def edit(raw: bytes) -> bytes:
        choice = rng.randrange(9)
        if choice == 0:
            return raw[: rng.randrange(len(raw))]
        if choice == 1:
            return rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"{}", b"NaN", b"9" * 5000])
        if choice == 2:
            return rng.choice([b"\xef\xbb\xbf" + raw, raw.decode("utf-8", "replace").encode("utf-16")])
        if choice == 3:
            return raw + rng.choice([b"\x00", b"{}", b" " * 1000, b"\n", b","])
        if choice == 4:
            return raw.replace(b'"r":3', b'"r":' + b"3" * rng.choice([1, 20, 4000, 5000, 100_000]))
        return flipped(raw, rng, rng.choice([1, 1, 2, 5]))

    case.edit_config = edit


def huge_config(case: Case, rng: random.Random) -> None:
    size = rng.choice([1 << 20, 3 << 20])
    choice = rng.randrange(3)
    if choice == 0:
        case.set("base_model_name_or_path", "x" * size)
    elif choice == 1:
        case.set("rank_pattern", {f"m{i}": 3 for i in range(20_000)})
        case.numbers = False  # the second reader compiles them all
    else:
        case.special = lambda d: os.truncate(d / CONFIG, 1 << 36)
        case.about, case.must_refuse = CONFIG, True


def flipped(raw: bytes, rng: random.Random, count: int, start: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(raw)
    for _ in range(count):
        at = rng.randrange(start, len(raw) if end is None else end)
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def data_start(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def header_bits(case: Case, rng: random.Random) -> None:
    case.edit_weights = lambda raw: flipped(raw, rng, rng.choice([1, 1, 2, 8]), 0, data_start(raw))


def data_bits(case: Case, rng: random.Random) -> None:
    case.edit_weights = lambda raw: flipped(raw, rng, rng.choice([1, 3, 30]), data_start(raw))


def cut(case: Case, rng: random.Random) -> None:
    case.edit_weights = lambda raw: raw[: rng.choice([rng.randrange(len(raw)), len(raw) - 1, 7, 8, 0])]
    case.about, case.must_refuse = WEIGHTS, True


def longer(case: Case, rng: random.Random) -> None:
    case.edit_weights = lambda raw: raw + bytes(rng.choice([1, 4, 4096]))
    case.about, case.must_refuse = WEIGHTS, True


def header_length(case: Case, rng: random.Random) -> None:
    wrong = [0, 1, 2, 7, 100, 10**6, 10**8 + 1, 2**31, 2**32, 2**53, 2**63, 2**63 - 1, 2**64 - 1, 2**64 - 8]
    delta = rng.choice([None, -1, 1, -8, 8, 64])
    length = rng.choice(wrong)

    def edit(raw: bytes) -> bytes:
        new = length if delta is None else int.from_bytes(raw[:8], "little") + delta
        return new.to_bytes(8, "little") + raw[8:]

    case.edit_weights = edit
    case.about, case.must_refuse = WEIGHTS, delta != 1 or None is delta
    if rng.random() < 0.2:
        case.edit_weights = lambda raw: int.from_bytes(raw[:8], "little").to_bytes(8, "big") + raw[8:]
        case.must_refuse = True


def header_text(case: Case, rng: random.Random) -> None:
    depth = rng.choice([100, 900, 5000, 100_000])
    texts = [
        b"", b"{}", b"[]", b"null", b"3", b'{"a":1}', b'{"__metadata__":{"a":1}}', b"[" * depth, b'{"a":' * depth,
        b'{"a":{"dtype":"F32","shape":[' + b"1," * depth + b'1],"data_offsets":[0,4]}}', b"\xff\xfe{}", b" {}", b"{",
        b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
    ]  # fmt: skip
    text = rng.choice(texts)
    case.edit_weights = lambda raw: len(text).to_bytes(8, "little") + text + raw[data_start(raw) :]
    case.about, case.must_refuse = WEIGHTS, True


def odd_address(case: Case, rng: random.Random) -> None:
    case.header_pad = rng.randint(1, 63)


def named(case: Case, entry: Entry) -> None:
    case.about = entry.name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def odd_shape(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    shapes: list[Any] = [
        [], [0], [1], [3], [18], [6, 3], [2, 9], [1, 18], [18, 1], [-1, 6], [2**63, 0], [0, 2**64], [2**32, 2**32],
        [2**62, 4], [3, 6, 1], [3, 6, 1, 1], [3, 6, 1, 1, 1], [1] * 70, [3.0, 6.0], ["3", 6], None, 3, {}, [[3, 6]],
        [True, 18], [1e1, 2], [0, 0], [3, 0, 6], entry.shape[::-1], [entry.shape[0]], [math.prod(entry.shape)],
    ]  # fmt: skip
    entry.shape = rng.choice(shapes)
    if rng.random() < 0.3:  # with bytes that fit
        try:
            entry.data = bytes(min(4 * math.prod(entry.shape), 1 << 16))
        except (TypeError, OverflowError, ValueError):
            entry.data = b""
    named(case, entry)


def wide_rank(case: Case, rng: random.Random) -> None:
    """A rank far beyond the sizes of the module: small files whose Gram matrices would be large."""
    r = rng.choice([64, 5000, 60_000])
    case.template, case.config = "linear", list((PLAIN | {"r": r}).items())
    case.entries = [
        Entry(f"{PREFIX}{Q}.lora_A.weight", "F16", [r, 6], bytes(12 * r)),
        Entry(f"{PREFIX}{Q}.lora_B.weight", "F16", [7, r], bytes(14 * r)),
    ]
    case.about = Q


def many_experts(case: Case, rng: random.Random) -> None:
    count = rng.choice([10, 100_000])
    case.template, case.config = "experts", list((PLAIN | FIELDS["experts"] | {"r": 1}).items())
    case.entries = [
        Entry(f"{PREFIX}mlp.experts.lora_A.weight", "F16", [count, 5], bytes(10 * count)),
        Entry(f"{PREFIX}mlp.experts.lora_B.weight", "F16", [4, count], bytes(8 * count)),
    ]
    case.about = "experts"


def other_sizes(case: Case, rng: random.Random) -> None:
    """Sound files of another shape: refused by the pool, or by the rank that the configuration names."""
    entry = rng.choice(case.entries)
    entry.shape = [max(1, n + rng.choice([-1, 0, 1])) for n in entry.shape]
    entry.data = encode(np.ones(entry.shape), entry.dtype)
    named(case, entry)


def odd_dtype(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    names: list[Any] = ["F64", "F16", "BF16", "I8", "U8", "BOOL", "I64", "U64", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3",
                        "C64", "f32", "F128", "", None, 3, [], "\u0000", "F8_E8M0", "U16", "U32"]  # fmt: skip
    entry.dtype = rng.choice(names)
    widths = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F16": 2, "BF16": 2, "U16": 2}
    if rng.random() < 0.7:
        size = math.prod(entry.shape) * widths.get(str(entry.dtype), 4 if entry.dtype == "U32" else 1)
        entry.data = rng.randbytes(size)
    named(case, entry)


def odd_offsets(case: Case, rng: random.Random) -> None:
    index = rng.randrange(len(case.entries))
    entry = case.entries[index]
    start = sum(len(e.data) for e in case.entries[:index])
    end = start + len(entry.data)
    entry.offsets = rng.choice([
        [start + 1, end + 1], [start + 4, end + 4], [start - 1, end - 1], [0, len(entry.data)], [end, start],
        [start, end + 1], [start, end - 1], [start, 2**63], [2**64 - len(entry.data), 2**64], [-4, end], [start], [],
        [start, end, end], None if index else [0, 0], "x", [float(start), float(end)], [str(start), str(end)],
        [2**63, 2**63 + len(entry.data)], [10**9, 10**9 + len(entry.data)], {"0": 0}, [None, None], [10**30, 10**31],
    ])  # fmt: skip
    named(case, entry)


def gap(case: Case, rng: random.Random) -> None:
    at = rng.randrange(len(case.entries))
    size = rng.choice([1, 4, 64, 4096])
    start = 0
    for i, entry in enumerate(case.entries):
        start += size if i == at else 0
        entry.offsets = [start, start + len(entry.data)]
        start += len(entry.data)
    before = sum(len(e.data) for e in case.entries[:at])
    case.edit_weights = lambda raw: raw[: data_start(raw) + before] + bytes(size) + raw[data_start(raw) + before :]
    case.about, case.must_refuse = WEIGHTS, True


def shuffled(case: Case, rng: random.Random) -> None:
    """The same tensors in another order of header and data: nothing is wrong with it."""
    start = 0
    for entry in rng.sample(case.entries, len(case.entries)):
        entry.offsets = [start, start + len(entry.data)]
        start += len(entry.data)
    case.edit_weights = lambda raw: raw  # the bytes stay, so tensors are read from each other's places
    if rng.random() < 0.5:
        rng.shuffle(case.entries)


def same_bytes_twice(case: Case, rng: random.Random) -> None:
    """Two names for one range: overlapping tensors."""
    one = rng.choice(case.entries)
    copy = Entry(one.name.replace("layers.0", "layers.7").replace("conv", "conv2"), one.dtype, one.shape, b"")
    copy.offsets = [0, len(case.entries[0].data)]
    case.entries.append(copy)
    case.must_refuse = True


def repeated_tensor(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    at = sum(len(e.data) for e in case.entries[: case.entries.index(entry)])
    shape = rng.choice([entry.shape, entry.shape[::-1], [entry.shape[0], math.prod(entry.shape[1:])]])
    twin = Entry(entry.name, entry.dtype, shape, b"", [at, at + len(entry.data)])
    case.entries.insert(rng.randrange(len(case.entries) + 1), twin)
    for i, other in enumerate(case.entries):
        if other.offsets is None:
            start = sum(len(e.data) for e in case.entries[:i])
            other.offsets = [start, start + len(other.data)]
    case.about, case.must_refuse = entry.name, True


def repeated_header_field(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    entry.more = [rng.choice([("dtype", "F16"), ("shape", entry.shape[::-1]), ("data_offsets", [0, 8]), ("x", 1)])]
    if entry.more[0][0] != "x":
        case.about, case.must_refuse = entry.name, True


def renamed(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    name = entry.name
    entry.name = rng.choice([
        name.removeprefix(PREFIX), PREFIX + name, name.replace("lora_A", "lora_B"), name + ".x", "", ".", "..", PREFIX,
        name.replace("lora_", "LORA_"), name.replace(".weight", ""), name.replace(".lora", ".default.lora"),
        "../../etc/x",
        name.replace("lora_A", "lora_A.default"), "__metadata__", PREFIX + "lora_A.weight", PREFIX + ".lora_A.weight",
        name.replace("q_proj", "q_proj.base_layer"), name.replace("self_attn", "base_layer.x"), "é\u200b" + name,
        name.replace("q_proj", "q\x00\x1b[2J\nproj"), name.replace("lora_A.weight", "lora_magnitude_vector"),
        "x" * 5000,
        name.replace("lora_B", "lora_embedding_B"), PREFIX + "modules_to_save.bias", PREFIX + "lm_head.weight",
        "\ud800",
    ])  # fmt: skip


def lost(case: Case, rng: random.Random) -> None:
    case.entries.remove(rng.choice(case.entries))


def special_values(case: Case, rng: random.Random) -> None:
    entry = rng.choice(case.entries)
    kind = entry.dtype
    values = np.random.default_rng(case.seed).standard_normal(entry.shape)
    value = rng.choice([math.nan, math.inf, -math.inf, 1e-310, -0.0, 1e30, 1e38, 6e4, 1e300, 1e160, 1e-40, 5e-324])
    values.reshape(-1)[rng.randrange(values.size)] = value
    if rng.random() < 0.2:
        values[:] = value
    with np.errstate(over="ignore", under="ignore"):
        entry.data = encode(values, kind)


def zeros(case: Case, rng: random.Random) -> None:
    for entry in case.entries:
        if rng.random() < 0.6:
            entry.data = bytes(len(entry.data))


def dependent(case: Case, rng: random.Random) -> None:
    """Factors of lower rank than they have columns."""
    for entry in case.entries:
        values = np.random.default_rng(case.seed).standard_normal(entry.shape)
        values[:] = values[:1]
        entry.data = encode(values * rng.choice([1, 1e-20, 1e15]), entry.dtype)


def odd_metadata(case: Case, rng: random.Random) -> None:
    case.metadata = rng.choice([None, {}, {"format": "tf"}, {"format": 3}, [], 3, "x", {"a": {"b": "c"}},
    {"x": "y" * 10**5},
                                {"format": "\u0000"}, Object([("format", "pt"), ("format", "np")])])  # fmt: skip


def special_file(case: Case, rng: random.Random) -> None:
    name = rng.choice([CONFIG, WEIGHTS])
    choice = rng.choice(
        ["directory", "loop", "dangling", "fifo", "zero", "urandom", "null", "unreadable", "gone", "huge"]
    )
    if choice in ("directory", "fifo", "zero", "null", "urandom"):
        case.must_refuse = True

    def place(directory: Path) -> None:
        path = directory / name
        path.unlink()
        if choice == "directory":
            path.mkdir()
        elif choice == "loop":
            path.symlink_to(path)
        elif choice == "dangling":
            path.symlink_to("/nonexistent/file")
        elif choice == "fifo":
            os.mkfifo(path)
        elif choice in ("zero", "null", "urandom"):
            path.symlink_to(f"/dev/{choice}")
        elif choice == "unreadable":
            path.symlink_to("/proc/self/mem")
        elif choice == "huge":
            with path.open("wb") as file:
                file.write(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
                file.truncate(1 << 40)

    case.special = place
    case.about = name


class Payload:
    """Leaves a file behind when it is unpickled, which must never happen."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class Call:
    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def torch_tensors(case: Case) -> dict[str, torch.Tensor]:
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {e.name: torch.frombuffer(bytearray(e.data), dtype=kinds[e.dtype]).reshape(e.shape) for e in case.entries}


def saved(value: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def rezipped(raw: bytes, **edits: Any) -> bytes:
    """A zip archive again, with another pickle or compression."""
    source, out = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(out, "w", edits.get("compression", zipfile.ZIP_STORED)) as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = edits.get("pickle", content) + bytes(edits.get("padding", 0))
            target.writestr(info.filename, content)
    return out.getvalue()


def torch_file(case: Case, rng: random.Random) -> None:
    tensors: dict[str, Any] = dict(torch_tensors(case))
    first = next(iter(tensors))
    choice = rng.choice(["sound", "flips", "flips", "flips", "cut", "payload", "value", "container", "bomb", "strides",
                         "legacy", "legacy flips", "pickle", "views"])  # fmt: skip
    marker = f"fastlora-fuzz-payload-{case.seed}"
    if choice == "payload":
        tensors[first] = Payload(marker)
    elif choice == "value":
        tensors[first] = rng.choice([
            3, None, "x", [1], Call(bytearray, (1 << 40,)), Call(torch.empty, (1 << 40,)), Call(eval, ("1",)),
            b"x" * 10,
            torch.zeros(3, 6).to_sparse(), torch.zeros(3, 6, dtype=torch.complex64), torch.empty(3, 6, device="meta"),
            torch.zeros(3, 6, dtype=torch.int32), torch.quantize_per_tensor(torch.zeros(3, 6), 0.1, 0, torch.qint8),
            torch.nn.Parameter(torch.zeros(3, 6)), torch.zeros(()), torch.zeros(3, 6, requires_grad=True),
        ])  # fmt: skip
    elif choice == "strides":
        tensors[first] = torch.zeros(1).expand(*rng.choice([(3, 6), (1 << 20, 1 << 20), (1 << 40,), (3, 1 << 33)]))
    elif choice == "views":
        tensors[first] = torch.zeros(100)[5:23].reshape(6, 3).T
    value: Any = tensors
    if choice == "container":
        value = rng.choice([[tensors], {"state_dict": tensors}, {3: torch.zeros(2)}, tensors[first], None, {}, 7])
    raw = saved(value, legacy=choice.startswith("legacy"))
    if choice.endswith("flips"):
        raw = flipped(raw, rng, rng.choice([1, 2, 10, 50]))
    elif choice == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif choice == "bomb":
        raw = rezipped(raw, compression=zipfile.ZIP_DEFLATED, padding=rng.choice([0, 1 << 20]))
    elif choice == "pickle":
        raw = rezipped(raw, pickle=rng.choice([
            b"", b"\x80\x02.", b"\x80\x02}.", b"N.", b"(" * 10**5, b"\x80\x02" + b"]" * 10**5 + b".", b"\x80\x02h\x09.",
            b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.", b"\x80\x02ctorch\nload\n.",
            b"\x80\x02X\xff\xff\xff\x7fa.",
            b"\x80\x02}q\x00h\x00h\x00s.", b"\x80\x02K\x01Q.", b"\x80\x02\x8a\xff" + b"a" * 255 + b".", b"\x80\x02)R.",
            pickle.dumps({"a": 1}, 2), pickle.dumps({"a": range(10**9)}, 2),
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        ]))  # fmt: skip
    case.numbers = choice in ("sound", "views")
    case.must_refuse = choice in ("payload", "container", "pickle", "bomb")

    def place(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / OLD_WEIGHTS).write_bytes(raw)

    case.special = place
    case.about = OLD_WEIGHTS


def untouched(case: Case, rng: random.Random) -> None:
    """Nothing is wrong: it must load and give the right numbers."""


MUTATORS: list[tuple[int, Callable[[Case, random.Random], None]]] = [
    (1, untouched), (8, odd_field), (3, several_fields), (2, missing_field), (3, repeated_field), (1, repeated_pattern),
    (3, valid_numbers), (2, slow_pattern), (2, nested_config), (4, config_bytes), (8, header_bits), (5, data_bits),
    (3, cut), (1, longer), (3, header_length), (2, header_text), (2, odd_address), (5, odd_shape), (1, other_sizes),
    (4, odd_dtype), (5, odd_offsets), (1, gap), (2, shuffled), (1, same_bytes_twice), (2, repeated_tensor),
    (1, repeated_header_field), (4, renamed), (1, lost), (5, special_values), (1, zeros), (1, dependent),
    (1, odd_metadata), (2, special_file), (5, torch_file),
]  # fmt: skip
RARE: list[Callable[[Case, random.Random], None]] = [huge_config, wide_rank, many_experts]


@functools.cache
def _weights() -> list[float]:
    return [w for w, _ in MUTATORS]


def mutation(seed: int) -> Case:
    """The damaged directory of one number."""
    rng = random.Random(seed)
    case = healthy(rng.choice(sorted(SHAPES)), rng.randrange(1000), rng.choice(["F32", "F32", "F16", "BF16", "F64"]))
    case.seed = seed
    if rng.random() < 0.004:
        chosen = [rng.choice(RARE)]
    else:
        count = 2 if rng.random() < 0.15 else 1
        chosen = [m for _, m in rng.choices(MUTATORS, _weights(), k=count)]
    for mutate in chosen[:1]:
        mutate(case, rng)
    if len(chosen) == 2 and chosen[0] in (odd_field, special_values, odd_address, valid_numbers):
        chosen[1](case, rng)
        case.about = None
    else:
        chosen = chosen[:1]
    case.kind = " + ".join(m.__name__ for m in chosen)
    return case


def mutations(seed: int) -> Iterator[Case]:
    """Endlessly many, each with the number that makes it again."""
    start = seed * 10_000_000
    while True:
        yield mutation(start)
        start += 1
