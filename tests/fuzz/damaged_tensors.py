"""What can be wrong with ``adapter_model.safetensors``, and with files as such."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from cases import CONFIG, FIELDS, PLAIN, PREFIX, WEIGHTS, Case, Entry, Object, Q, encode, flipped


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
