"""Modules that a reader looks for to know a dialect, or to read a block at all: where an adapter lacks them, they are
written as zeros."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastlora.dialects.family import Family
from fastlora.dialects.laying import Laid
from fastlora.dialects.patterns import expanded
from fastlora.dialects.spelling import Style, stem_of

Zeros = dict[str, tuple[str, tuple[int, int]]]
Leaves = Mapping[str, tuple[str, str]]
"""Modules of a block, with the names of the two sizes of their weights."""

KNOWN_BY: Mapping[str, tuple[str, str]] = {"hunyuan_video": ("transformer_blocks.0.attn.to_qkv", "img_attn_qkv")}
"""By family: a module, and what diffusers looks for in the names of a file in those of the original code."""

AS_WIDE_IN = (".ff.net.0.proj", ".ff_context.net.0.proj", ".attn.to_added_qkv", "norm.linear", "norm1.linear")
AS_WIDE_OUT = (".ff.net.2", ".ff_context.net.2", ".attn.to_add_out", ".attn.to_out.0", ".proj_out")
"""Ends of modules that have the width of the model as columns, or as rows."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of which diffusers' converter takes every module for granted, from block 0 on.

    ``leaves``: by what stands before the number. ``also``: needed in every block where one of them is there. ``sizes``:
    of published models, by their width ``h``.
    """

    leaves: Mapping[str, Leaves]
    also: Leaves = field(default_factory=dict)
    sizes: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


def _of_size(rows: str, columns: str, *patterns: str) -> dict[str, tuple[str, str]]:
    return {leaf: (rows, columns) for pattern in patterns for leaf in expanded(pattern)}


_WAN = {
    **_of_size("h", "h", "{attn1,attn2}.{to_q,to_k,to_v,to_out.0}"),
    **_of_size("f", "h", "ffn.net.0.proj"),
    **_of_size("h", "f", "ffn.net.2"),
}
_CONTEXT = {
    **_of_size("qkv", "h", "attn.to_qkv"),
    **_of_size("h", "h", "attn.to_out.0"),
    **_of_size("f", "h", "feed_forward.{linear_1,linear_3}"),
    **_of_size("h", "f", "feed_forward.linear_2"),
}
_LUMINA = {**_CONTEXT, **_of_size("4h", "t", "norm1.linear")}
WHOLE: Mapping[tuple[str, str], Blocks] = {
    ("wan", "kohya-original"): Blocks(
        {"blocks": _WAN},
        _of_size("h", "h", "attn2.{add_k_proj,add_v_proj}"),
        {1536: {"f": 8960}, 3072: {"f": 14336}, 5120: {"f": 13824}},
    ),
    ("lumina2", "diffusion_model"): Blocks(
        {"layers": _LUMINA, "noise_refiner": _LUMINA, "context_refiner": _CONTEXT},
        sizes={2304: {"f": 9216, "qkv": 3840, "4h": 9216, "t": 1024}},
    ),
}
"""By family and dialect."""
_NUMBERED = re.compile(r"(\w+)\.(\d+)\.(.+)")


def expected_zeros(own: Laid, style: Style, family: Family | None) -> Zeros:
    """``{stem: (module, shape)}`` of what is to be written as zeros."""
    if family is None or not style.original:
        return {}
    blocks = WHOLE.get((family.name, style.name))
    if blocks is not None:
        return _missing(own, blocks, style, family)
    known = KNOWN_BY.get(family.name)
    if known is None or style.flat:
        return {}
    module, looked_for = known
    if any(looked_for in stem for stem in own.modules):
        return {}
    width = _width(own)
    stem = stem_of(module, style, family, None)
    return {} if width is None or stem is None else {stem: (module, (3 * width, width))}


def _width(own: Laid) -> int | None:
    for module, update in own.updates.items():
        if module.endswith(AS_WIDE_IN):
            return update.shape[1]
        if module.endswith(AS_WIDE_OUT):
            return update.shape[0]
    return None


def _missing(own: Laid, blocks: Blocks, style: Style, family: Family) -> Zeros:
    """What the blocks of a file lack. Nothing where there are other modules, which the converter does not take, or
    where the modules that are there do not tell the shapes of the others."""
    there: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for module, shape in _shapes(own).items():
        found = _NUMBERED.fullmatch(module)
        leaves = {} if found is None else {**blocks.leaves.get(found[1], {}), **blocks.also}
        if found is None or found[3] not in leaves:
            return {}
        there.setdefault(found[1], set()).add(module)
        for name, size in zip(leaves[found[3]], shape, strict=True):
            if sizes.setdefault(name, size) != size:
                return {}
    sizes = {**blocks.sizes.get(sizes.get("h", 0), {}), **sizes}
    zeros: Zeros = {}
    for module, (rows, columns) in _needed(there, blocks):
        if module in there[module.partition(".")[0]]:
            continue
        stem = stem_of(module, style, family, None)
        if stem is None or rows not in sizes or columns not in sizes:
            return {}
        zeros[stem] = module, (sizes[rows], sizes[columns])
    return zeros


def _shapes(own: Laid) -> dict[str, tuple[int, int]]:
    """The shape of the weight of every module of the file."""
    return {own.modules[place.stem]: (place.rows, own.updates[m].shape[1]) for m, place in own.places.items()}


def _needed(there: Mapping[str, set[str]], blocks: Blocks) -> Iterator[tuple[str, tuple[str, str]]]:
    for root, modules in there.items():
        has_also = any(module.endswith(tuple(blocks.also)) for module in modules) if blocks.also else False
        leaves = {**blocks.leaves[root], **(blocks.also if has_also else {})}
        for number in range(1 + max(int(module.split(".")[1]) for module in modules)):
            yield from ((f"{root}.{number}.{leaf}", sizes) for leaf, sizes in leaves.items())
