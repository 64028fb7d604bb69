"""What can be wrong with single files: a case of :mod:`single_files` by its number."""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1])]

import plain_reader  # noqa: E402

from tests.dialects.files import ALPHAS, CASES, sample  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]


@dataclass
class Case:
    """A file: ``tensors`` and ``metadata`` are written, then ``edit`` changes the bytes. ``modules``: as the sound file
    has them, ``{stem: module}``; ``home``: its family. ``family``, ``rank``: what it is read with."""

    seed: int
    kind: str
    home: str
    tensors: dict[str, Tensor]
    modules: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    rank: int | None = None
    suffix: str = "safetensors"
    edit: Callable[[bytes], bytes] = bytes


Damage = Callable[[Case, random.Random], None]


def stem_of(name: str) -> str:
    found = plain_reader.split(name)
    return name if found is None else found[0]


def any_stem(case: Case, rng: random.Random) -> str:
    return rng.choice(list(case.modules))


def drop(case: Case, rng: random.Random) -> None:
    del case.tensors[rng.choice(list(case.tensors))]


def rename(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    old, new = rng.choice([
        ("lora_down", "lora_up"), ("lora_up", "lora_down"), ("lora_A", "lora_B"), (".weight", ""), (".weight", ".bias"),
        ("lora_", "LORA_"), (".alpha", ".alpha.x"), ("lora_unet_", "lora_te_"), ("lora_unet_", "lora_unet__"),
        ("lora_unet_", ""), ("diffusion_model.", "model.diffusion_model."), ("transformer.", "unet."),
        ("blocks", "block"), ("_0_", "_1_"), (".0.", ".99."), ("to_q", "to_k"), ("attn", "atn"),
        (".weight", ".x.weight"),
        ("lora_A", "lora_A.other"), (".alpha", ".scale"), (".alpha", ".scalar"), ("lora_up.weight", "diff"),
        ("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora.up.weight"), ("_", "."), (".", "_"),
    ])  # fmt: skip
    tensor = case.tensors.pop(name)
    case.tensors[name.replace(old, new) or "x"] = tensor


def wrong_shape(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    tensor = case.tensors[name]
    with contextlib.suppress(RuntimeError, IndexError):
        case.tensors[name] = rng.choice([
            lambda t: t.flatten(), lambda t: t.mT, lambda t: t[:-1], lambda t: t[None], lambda t: t[..., None],
            lambda t: t[..., None, None], lambda t: t[:, :-1], lambda t: t[:0], lambda t: t.reshape(1, -1),
            lambda t: t.reshape(-1, 1), lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t], 1),
            lambda t: t.repeat(200, 1), lambda t: t.flatten(1),
        ])(tensor).contiguous()  # fmt: skip


def wrong_dtype(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    dtypes = [*DTYPES, torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2]
    case.tensors[name] = case.tensors[name].float().to(rng.choice(dtypes))


def values(case: Case, rng: random.Random) -> None:
    name = rng.choice(list(case.tensors))
    tensor = case.tensors[name].clone()
    value = rng.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-30, 1e30, 65504.0, 1e-40])
    flat = tensor.reshape(-1)
    with contextlib.suppress(RuntimeError, OverflowError, IndexError, ValueError):
        flat[:] = value if rng.random() < 0.5 else flat
        flat[rng.randrange(len(flat))] = value
    case.tensors[name] = flat.reshape(tensor.shape)


def alphas(case: Case, rng: random.Random) -> None:
    stem = any_stem(case, rng)
    case.tensors[f"{stem}.alpha"] = rng.choice([
        torch.tensor(0.0), torch.tensor(-3.0), torch.tensor(7), torch.tensor([2.0]), torch.ones(2), torch.ones(1, 1),
        torch.tensor(torch.nan), torch.tensor(1e30), torch.tensor(True), torch.tensor(0.3, dtype=torch.bfloat16),
        torch.tensor(2.0, dtype=torch.float8_e4m3fn), torch.zeros(0),
    ])  # fmt: skip


def twice(case: Case, rng: random.Random) -> None:
    """The same module again under another spelling of its factors, or under another prefix."""
    stem = any_stem(case, rng)
    names = [n for n in case.tensors if stem_of(n) == stem]
    for name in names:
        copy = case.tensors[name].clone()
        new = rng.choice([
            name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"), name.replace("lora_A", "lora_down"),
            name.replace("lora_unet_", "lycoris_"), name.replace("diffusion_model.", ""),
            name.replace("diffusion_model.", "transformer."), f"transformer.{case.modules[stem]}.lora_A.weight",
        ])  # fmt: skip
        case.tensors.setdefault(new, _times(copy, rng.choice([1, 1, 2])))


def _times(tensor: Tensor, number: int) -> Tensor:
    return (tensor.float() * number).to(tensor.dtype)


def beside(case: Case, rng: random.Random) -> None:
    stem = any_stem(case, rng)
    rows = next((t.shape[0] for n, t in case.tensors.items() if n.startswith(f"{stem}.") and "up" in n[-14:]), 24)
    name, tensor = rng.choice([
        ("diff_b", torch.ones(rows)), ("diff_b", torch.ones(3)), ("lora_B.bias", torch.ones(rows)),
        ("w_norm", torch.ones(rows)),
        ("dora_scale", torch.ones(rows, 1)), ("dora_scale", torch.ones(1, 7)), ("dora_scale", torch.ones(rows)),
        ("scalar", torch.tensor(2.0)), ("scale", torch.tensor(0.5)), ("oft_blocks", torch.ones(2, 2, 2)),
        ("diff_m", torch.ones(2)),
        ("a1.weight", torch.ones(2, 2)), ("set_weight", torch.ones(rows)), ("reshape_weight", torch.ones(2)),
        ("on_input", torch.ones(1)), ("unknown", torch.ones(1)), ("lora_mid.weight", torch.ones(2, 2, 3, 3)),
    ])  # fmt: skip
    case.tensors[f"{stem}.{name}"] = tensor


def lycoris(case: Case, rng: random.Random) -> None:
    """A module in a form of LyCORIS, whose shapes fit or nearly fit."""
    stem = any_stem(case, rng)
    for name in [n for n in case.tensors if stem_of(n) == stem]:
        del case.tensors[name]
    r, n, m, p = rng.randint(1, 4), rng.choice([8, 24]), rng.choice([8, 24]), rng.choice([1, 2, 4])
    forms: list[dict[str, tuple[int, ...]]] = [
        {"hada_w1_a": (n, r), "hada_w1_b": (r, m), "hada_w2_a": (n, r), "hada_w2_b": (r, m)},
        {"hada_w1_a": (n, r), "hada_w1_b": (r, m), "hada_w2_a": (n, 2), "hada_w2_b": (2, m)},
        {"hada_w1_a": (r, n), "hada_w1_b": (r, m), "hada_t1": (r, r, 3, 3)}
        | {"hada_w2_a": (r, n), "hada_w2_b": (r, m), "hada_t2": (r, r, 3, 3)},
        {"lokr_w1": (p, p), "lokr_w2": (n, m)},
        {"lokr_w1": (p, 2), "lokr_w2": (n, m, 3, 3)},
        {"lokr_w1": (p, p), "lokr_w2_a": (n, r), "lokr_w2_b": (r, m)},
        {"lokr_w1_a": (p, r), "lokr_w1_b": (r, p), "lokr_w2_a": (n, r), "lokr_w2_b": (r, m)},
        {"lokr_w1": (p, p), "lokr_t2": (r, r, 3, 3), "lokr_w2_a": (r, n), "lokr_w2_b": (r, m)},
        {"lora_up.weight": (n, r, 1, 1), "lora_down.weight": (r, m, 1, 1), "lora_mid.weight": (r, r, 3, 3)},
        {"diff": (n, m)},
        {"diff": (n, m, 3, 3)},
        {"lokr_w1": (40, 40), "lokr_w2": (n, m)},
    ]
    shapes = rng.choice(forms)
    if rng.random() < 0.2:
        shapes.pop(rng.choice(list(shapes)))
    generator = torch.Generator().manual_seed(case.seed)
    case.tensors |= {f"{stem}.{k}": torch.randn(s, generator=generator) for k, s in shapes.items()}
    if rng.random() < 0.6:
        case.tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    if rng.random() < 0.3:
        case.rank = rng.randint(1, 8)


def metadata(case: Case, rng: random.Random) -> None:
    fields: object = rng.choice([
        {"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 2}, {"r": 0, "lora_alpha": 1}, {"r": "4"}, {"lora_alpha": 3},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}}, {"r": 4, "lora_alpha": None}, [], "x", None,
        {"r": 2, "lora_alpha": 4, "use_rslora": True}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}},
        {"r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 1 << 40, "lora_alpha": 1e308},
    ])  # fmt: skip
    named = {f"transformer.{k}": v for k, v in fields.items()} if isinstance(fields, dict) else fields
    case.metadata |= {"lora_adapter_metadata": json.dumps(named)}
    if rng.random() < 0.7:
        case.tensors = {k: t for k, t in case.tensors.items() if not k.endswith(".alpha")}
    if rng.random() < 0.3:
        case.metadata |= {"ss_network_alpha": rng.choice(["8", "nan", "x", ""]), "ss_base_model_version": "sd_v1"}


def flips(case: Case, rng: random.Random) -> None:
    """Bits of the header or of the data."""
    count, in_header = rng.choice([1, 2, 8]), rng.random() < 0.5
    places = [rng.random() for _ in range(count)]

    def edit(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        first, end = (0, min(start, len(raw))) if in_header else (min(start, len(raw) - 1), len(raw))
        damaged = bytearray(raw)
        for place in places:
            at = first + int(place * (end - first))
            damaged[at] ^= 1 << (at % 8)
        return bytes(damaged)

    case.edit = edit


def cut(case: Case, rng: random.Random) -> None:
    share, more = rng.random(), rng.choice([0, 0, 1, 4096])
    case.edit = lambda raw: raw + bytes(more) if more else raw[: int(share * len(raw))]


def other_family(case: Case, rng: random.Random) -> None:
    case.family = rng.choice(["sd15", "sdxl", "flux", "wan", "sd3", "nothing", ""])


DAMAGES: list[Damage] = [
    drop, rename, rename, rename, wrong_shape, wrong_shape, wrong_dtype, values, values, alphas, alphas, twice, beside,
    beside, lycoris, lycoris, lycoris, metadata, flips, flips, cut, other_family,
]  # fmt: skip


def make(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)
    family, dialect = rng.choice(CASES)
    alpha = rng.choice(list(ALPHAS.values()))
    ranks = rng.choice([(2, 4, 3), (1,), (4,)])
    file = sample(family, dialect, alpha, ranks, rng.choice(DTYPES), text=rng.random() < 0.3)
    keep = set(rng.sample(list(file.stems), rng.randint(1, len(file.stems))))
    modules = {stem: module for module, stem in file.stems.items() if module in keep}
    tensors = {k: t for k, t in file.tensors.items() if stem_of(k) in modules}
    case = Case(seed, "", family, tensors, modules, family=family if rng.random() < 0.4 else None)
    case.suffix = "bin" if rng.random() < 0.1 else "safetensors"
    chosen = rng.sample(DAMAGES, rng.choice([0, 1, 1, 1, 1, 2]))
    for damage in chosen:
        if case.tensors:
            damage(case, rng)
    case.kind = " + ".join(d.__name__ for d in chosen) or "sound"
    return case
