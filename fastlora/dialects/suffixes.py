"""What a tensor of a single file is to its module: the end of its name says it.

A name is the module's stem and a suffix, ``lora_unet_mid_block_attentions_0_proj_in`` and ``.lora_down.weight``. The
longest suffix counts. One that is not known is refused, since readers that skip it lose what it holds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.errors import InputError, UnsupportedAdapter

PARTS: Mapping[str, str] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_A": "down",  # Mochi
    "lora_B": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
    "set_weight": "set_weight",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "magnitude": "magnitude",
    "scalar": "scalar",
    "scale": "scale",
}
"""From a suffix, without its first dot, to what it is."""

SPELLINGS: Mapping[str, str] = {
    "lora_down.weight": "down",
    "lora_A.weight": "A",
    "lora_A": "A",
    "lora.down.weight": "lora-dot",
    "lora_linear_layer.down.weight": "lora-linear-layer",
}
"""How factors are called, by the suffix of one of them."""

NEEDS_BASE = (
    "what it changes depends on the base model. Merge it into the model with the tool that it is from, and take the "
    "difference of the two models (`fastlora extract BASE TUNED --rank N`)"
)
REFUSED: Sequence[tuple[re.Pattern[str], str, str]] = (
    (
        re.compile(r".+\.(oft_blocks|oft_diag|boft_blocks|oft_R(\..+)?)"),
        "OFT or BOFT, which rotates weights",
        NEEDS_BASE,
    ),
    (re.compile(r".+\.[ab][12]\.weight"), "GLoRA, which multiplies weights", NEEDS_BASE),
    (re.compile(r".+\.on_input"), "(IA)³ of LyCORIS, which scales weights", NEEDS_BASE),
    (
        re.compile(r".+\.(lambda_layer|q_layer\.weight|p_layer\.weight)"),
        "T-LoRA, whose rank depends on the step of sampling",
        "it is no change of the weights: use it with the tool that it is from",
    ),
    (
        re.compile(r".+\.diff_m"),
        "a change of modulation tensors that one program alone applies (diff_m)",
        "leave these tensors out of the file to read the rest",
    ),
    (
        re.compile(r".+\.reshape_weight"),
        "for a base model whose weight is enlarged first (reshape_weight, control LoRA)",
        "there is no way to read it without that model: use it with the tool that it is from",
    ),
)
"""Names of tensors that are no additive change: what they are, and the way out."""

EMBEDDINGS = re.compile(r"bundle_emb\..+")
"""Embeddings of textual inversion that some trainers put into the file of a LoRA."""
NAMED = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.(?P<what>weight|bias)")
NAMED_MAGNITUDE = re.compile(r"(?P<stem>.+)\.lora_magnitude_vector\.(?P<adapter>[^.]+)(\.weight)?")
PROCESSOR = re.compile(r"(?P<stem>.+)_lora\.(?P<part>down|up)\.weight")
XLABS = re.compile(r"(?P<stem>.+\.processor\.(?:qkv|proj)_lora\d?)\.(?P<part>down|up)\.weight")
NORM_SCALE = re.compile(r"(?P<stem>.+_norm)\.scale")
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
LISTED = 4


class Split(NamedTuple):
    """A tensor's name in parts: the ``stem`` as it stands there, what the tensor is, how that is spelled, and the name
    of an adapter inside it."""

    stem: str
    part: str
    spelling: str = ""
    adapter: str | None = None


@dataclass(slots=True, eq=False)
class Stored:
    """The tensors of one module. ``stem``: what the file calls it. ``plain``: the same without the detours of old
    spellings. ``parts``: tensors by what they are (the values of :data:`PARTS`). ``keys``: their full names."""

    stem: str
    plain: str
    parts: dict[str, Tensor]
    keys: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """The modules of a file by stem, how most of them spell their factors (``down``, ``A``, ``lora-dot``,
    ``lora-linear-layer``, ``processor``, ``xlabs``; empty without plain factors), and what is worth telling."""

    modules: dict[str, Stored]
    spelling: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sorted:
    """The same for the names alone, which adapters of one recipe share.

    ``modules``: ``(stem, plain stem, ((part, name), …))`` of each. ``spellings``: of factors. ``twice``: names of one
    and the same part. ``left_out``: bundled embeddings. ``refused``: a name that is no additive change, what it is, and
    the way out. ``unknown``: names without a known suffix. ``adapters``: names of adapters inside names.
    """

    modules: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    spelling: str
    spellings: frozenset[str]
    twice: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    refused: tuple[str, str, str] | None
    unknown: tuple[str, ...]
    adapters: tuple[str, ...]


def group(tensors: Mapping[str, Tensor], file: Path) -> Grouped:
    """The tensors of a file by module; nothing is read or copied.

    Raises :class:`InputError` for unknown suffixes, for a part that is there twice with different numbers and for
    several adapters in one file, and :class:`UnsupportedAdapter` for what is no additive change of weights.
    """
    plan = sorted_names(tuple(tensors))
    if plan.refused is not None:
        key, what, way_out = plan.refused
        raise UnsupportedAdapter(f"{file}: tensor {key!r} is {what}; {way_out}")
    if plan.unknown:
        more = f" and {len(plan.unknown) - LISTED} more" if len(plan.unknown) > LISTED else ""
        raise UnsupportedAdapter(
            f"{file} has tensors of an unknown kind: {', '.join(map(repr, plan.unknown[:LISTED]))}{more}; what they "
            "change would be lost. Remove them from the file if they carry nothing"
        )
    if len(plan.adapters) > 1:
        raise InputError(
            f"{file} holds {len(plan.adapters)} adapters ({', '.join(plan.adapters[:LISTED])}); save each in a file of "
            "its own"
        )
    for first, second in plan.twice:
        if not same(tensors[first], tensors[second]):
            raise InputError(
                f"{file}: tensors {first!r} and {second!r} are the same part of one module and differ; remove one"
            )
    modules = {
        stem: Stored(stem, plain, {part: tensors[key] for part, key in keys}, dict(keys))
        for stem, plain, keys in plan.modules
    }
    notes = [f"{len(plan.twice)} tensors are there twice under two names, and equal: one of each counts"]
    left_out = [f"embeddings that are bundled with it are left out: {', '.join(plan.left_out[:LISTED])}"]
    return Grouped(modules, plan.spelling, (*notes * bool(plan.twice), *left_out * bool(plan.left_out)))


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


@functools.lru_cache(maxsize=32)
def sorted_names(keys: tuple[str, ...]) -> Sorted:
    """The names of a file's tensors by module."""
    modules: dict[str, dict[str, str]] = {}
    plain: dict[str, str] = {}
    spelled: dict[str, int] = {}
    adapters: dict[str, None] = {}
    twice: list[tuple[str, str]] = []
    left_out: list[str] = []
    unknown: list[str] = []
    refused: tuple[str, str, str] | None = None
    for key in keys:
        found = split(key)
        if found is None:
            if EMBEDDINGS.fullmatch(key):
                left_out.append(key)
                continue
            reason = next(((key, what, out) for pattern, what, out in REFUSED if pattern.fullmatch(key)), None)
            refused = refused or reason
            if reason is None:
                unknown.append(key)
            continue
        stem, part, spelling, adapter = found
        if adapter is not None:
            adapters[adapter] = None
        if spelling:
            spelled[spelling] = spelled.get(spelling, 0) + 1
        parts = modules.setdefault(stem, {})
        if part in parts:
            twice.append((parts[part], key))
        else:
            parts[part] = key
            plain[stem] = plain_stem(stem) if spelling == "processor" else plain.get(stem, stem)
    return Sorted(
        tuple((stem, plain[stem], tuple(parts.items())) for stem, parts in modules.items()),
        max(spelled, key=spelled.__getitem__, default=""),
        frozenset(spelled),
        tuple(twice),
        tuple(left_out),
        refused,
        tuple(unknown),
        tuple(adapters),
    )


def split(key: str) -> Split | None:
    """A tensor's name in parts; ``None`` for a suffix that is not known here."""
    ends = key.rsplit(".", 3)
    for count in (3, 2, 1):
        if len(ends) <= count:
            continue
        suffix = ".".join(ends[-count:])
        part = PARTS.get(suffix)
        if part is not None:
            stem = key[: -len(suffix) - 1]
            if suffix == "scale" and NORM_SCALE.fullmatch(key):
                part = "set_weight"
            return Split(stem, part, SPELLINGS.get(suffix, "")) if stem else None
    match = NAMED.fullmatch(key)
    if match is not None:
        part = PARTS.get(f"lora_{match['side']}.{match['what']}")
        return None if part is None else Split(match["stem"], part, "A" if part == "down" else "", match["adapter"])
    match = NAMED_MAGNITUDE.fullmatch(key)
    if match is not None:
        return Split(match["stem"], "magnitude", "", match["adapter"])
    match = XLABS.fullmatch(key)
    if match is not None:
        return Split(match["stem"], match["part"], "xlabs")
    match = PROCESSOR.fullmatch(key)
    return None if match is None else Split(match["stem"], match["part"], "processor")


def plain_stem(stem: str) -> str:
    """What diffusers calls a module today that old attention processors called ``….attn1.processor.to_out``, or old
    text encoders ``….self_attn.to_out``."""
    path, _, leaf = stem.replace(".processor.", ".").rpartition(".")
    if path.endswith("self_attn"):
        return f"{path}.{OLD_TEXT.get(leaf, leaf)}"
    return f"{path}.to_out.0" if leaf == "to_out" else f"{path}.{leaf}"
