"""What an adapter holds beside factors, as a single file has it: changes of biases and norms, replaced weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.file_form import FileForm
from fastlora.dialects.family import Family
from fastlora.dialects.spelling import Style, is_swapped, stem_of
from fastlora.errors import OutputError

SUFFIXES: Mapping[tuple[str, str], str] = {
    ("delta", "bias"): ".diff_b",
    ("delta", "weight"): ".diff",
    ("value", "weight"): ".set_weight",
}
"""By the kind of an extra and the parameter that it is of."""


def extra_tensors(adapter: LoraData, style: Style, family: Family | None, form: FileForm) -> dict[str, Tensor]:
    """``{name: tensor}`` of what is beside the factors. Raises :class:`OutputError` for what the dialect lacks."""
    result: dict[str, Tensor] = {}
    for parameter, extra in adapter.extras.items():
        module, _, leaf = parameter.rpartition(".")
        suffix = SUFFIXES.get((extra.kind, leaf))
        stem = form.stems.get(module) if form.style else None
        if stem is None and family is not None:
            stem = stem_of(module, style, family, None)
        if suffix is None or stem is None or style.format not in ("kohya", "comfy"):
            raise OutputError(
                f"adapter {adapter.name!r} changes {parameter} beside its factors, for which files of the dialect "
                f"{style.name!r} have no place; leave such parameters out with `adapter.without_extras()` "
                "(--drop-extras), or write format='comfy'"
            )
        shape = adapter.updates[module].shape if module in adapter else None
        is_row_of_weight = leaf == "bias" or extra.kind == "value"
        if family is not None and is_row_of_weight and is_swapped(module, stem, family, shape):
            half = extra.tensor.shape[0] // 2
            result[stem + suffix] = torch.cat([extra.tensor[half:], extra.tensor[:half]])
        else:
            result[stem + suffix] = extra.tensor
    return result
