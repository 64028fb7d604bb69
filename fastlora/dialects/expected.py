"""Modules that a reader looks for to know a dialect: where an adapter has none of them, one is written as zeros."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.dialects.family import Family
from fastlora.dialects.laying import Laid
from fastlora.dialects.spelling import Style, stem_of

KNOWN_BY: Mapping[str, tuple[str, str]] = {"hunyuan_video": ("transformer_blocks.0.attn.to_qkv", "img_attn_qkv")}
"""By family: a module, and what diffusers looks for in the names of a file in those of the original code."""

AS_WIDE_IN = (".ff.net.0.proj", ".ff_context.net.0.proj", ".attn.to_added_qkv", "norm.linear", "norm1.linear")
AS_WIDE_OUT = (".ff.net.2", ".ff_context.net.2", ".attn.to_add_out", ".attn.to_out.0", ".proj_out")
"""Ends of modules that have the width of the model as columns, or as rows."""


def expected_zeros(own: Laid, style: Style, family: Family | None) -> dict[str, tuple[str, tuple[int, int]]]:
    """``{stem: (module, shape)}`` of what is to be written as zeros."""
    known = None if family is None else KNOWN_BY.get(family.name)
    if family is None or known is None or not style.original or style.flat:
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
