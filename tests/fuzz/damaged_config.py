"""What can be wrong with ``adapter_config.json``."""

from __future__ import annotations

import json
import os
import random

from cases import CONFIG, ODD, PLAIN, PREFIX, Case, Object, flipped

KNOWN_FIELDS = [*PLAIN, "rank_pattern", "alpha_pattern", "r", "lora_alpha", "use_qalora", "kasa_config", "eva_config",
                "exclude_modules", "trainable_token_indices", "ensure_weight_tying", "velora_config", "peft_version",
                "layers_pattern", "unknown_field", "loftq_config", "arrow_config", "use_bdlora", "inference_mode",
                "megatron_config", "monteclora_config", "alora_invocation_tokens"]  # fmt: skip
SLOW_PATTERNS = [
    "(a+)+$x", "(.*)*x", "(.*.*.*.*.*.*.*.*)*!", "(.|.)*!", "(a|aa|.)+!", "((.*)*)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!",
    "(.?){500}!", "(.{0,200}){200}!", "(.*){1000000}!", r"(\w+\.?)+!", r"(?:(?:\w|\.)+)+!", r"([\w.]+)*\1!",
    "(?=(.*)*!).*", "(?!(.+)+!)zz", "(?i:(A+)+)$!", r"(?P<n>.*)(?P=n)*!", "(((((((((.?)?)?)?)?)?)?)?)?)*!", "(.*?)*?!",
    "(?!model).*", r"(?<=\.)q_proj.*.*", "((a?){30}){30}!", "(" * 90 + "a" + ")*" * 90 + "!",
]  # fmt: skip
FAST_PATTERNS = {
    "q_proj": 1, ".*q_proj": 1, r"layers\.\d+\..*": 1, "^model.*": 1, "(q|v)_proj": 1, "x": 1,
    "self_attn.(q_proj|k)": 1,
    r"model\.(layers)\.[0-9]+\.(self_attn|mlp)\.[qv]_proj": 1, r"layers\.(0|1).*_proj$": 1, ".+": 1,
    "(?:.*attn.*){1,2}": 1, "self.attn.v.proj": 1, ".q_proj": 1, "attn.q_proj": 1, "proj": 1,
    "onv": 1, "[^.]+_proj": 1, r"\w{2,9}": 1, "(a|b|)*q_proj": 1,
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
