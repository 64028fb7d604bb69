"""What an adapter holds beside factors, as a single file has it: changes of biases and norms, replaced weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.file_form import FileForm
from fastlora.dialects.family import Family
from fastlora.dialects.laying import Laid
from fastlora.dialects.spelling import Style, component_of, is_swapped, stem_of
from fastlora.errors import OutputError

SUFFIXES: Mapping[tuple[str, str], str] = {
    ("delta", "bias"): ".diff_b",
    ("delta", "weight"): ".diff",
    ("value", "weight"): ".set_weight",
}
"""By the kind of an extra and the parameter that it is of."""
BIAS_OF_B = ".lora_B.bias"


def extra_tensors(
    adapter: LoraData, own: Laid, style: Style, family: Family | None, form: FileForm
) -> dict[str, Tensor]:
    """``{name: tensor}`` of what is beside the factors. Raises :class:`OutputError` for what the dialect lacks."""
    if has_bias_of_B(style) and family is not None:
        return _biases_of_B(adapter, own, style, family)
    result: dict[str, Tensor] = {}
    for parameter, extra in adapter.extras.items():
        module, _, leaf = parameter.rpartition(".")
        suffix = SUFFIXES.get((extra.kind, leaf))
        stem = form.stems.get(module) if form.style else None
        if stem is None and family is not None:
            stem = stem_of(module, style, family, None)
        if suffix is None or stem is None or style.format not in ("kohya", "comfy"):
            raise _without_place(adapter, parameter, style)
        shape = adapter.updates[module].shape if module in adapter else None
        is_row_of_weight = leaf == "bias" or extra.kind == "value"
        if family is not None and is_row_of_weight and is_swapped(module, stem, family, shape):
            half = extra.tensor.shape[0] // 2
            result[stem + suffix] = torch.cat([extra.tensor[half:], extra.tensor[:half]])
        else:
            result[stem + suffix] = extra.tensor
    return result


def has_bias_of_B(style: Style) -> bool:
    """Whether files of a dialect can have ``lora_B.bias``, as PEFT's ``lora_bias`` has it: the scale is inside it."""
    return style.name == "component"


def components_with_bias(extras: Mapping[str, Tensor], own: Laid) -> set[str]:
    """The components some module of which has a ``lora_B.bias`` in a file; ``""`` is the denoiser."""
    return {component_of(own.modules[name.removesuffix(BIAS_OF_B)])[0] for name in extras if name.endswith(BIAS_OF_B)}


def _biases_of_B(adapter: LoraData, own: Laid, style: Style, family: Family) -> dict[str, Tensor]:
    """PEFT has a bias in every module of a model, or in none: those that are not changed are zeros."""
    shifts: dict[str, Tensor] = {}
    for parameter, extra in adapter.extras.items():
        module, _, leaf = parameter.rpartition(".")
        if leaf != "bias" or extra.kind != "delta":
            raise _without_place(adapter, parameter, style)
        for part, shift in _in_parts(module, extra.tensor, adapter, family):
            stem = stem_of(part, style, family, None)
            if stem not in own.modules:
                raise _without_place(adapter, parameter, style)
            shifts[stem] = shift
    components = {component_of(own.modules[stem])[0] for stem in shifts}
    rows = {place.stem: place.rows for place in own.places.values()}
    return {
        stem + BIAS_OF_B: shifts[stem] if stem in shifts else torch.zeros(rows[stem])
        for stem, module in own.modules.items()
        if component_of(module)[0] in components
    }


def _in_parts(module: str, shift: Tensor, adapter: LoraData, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The change of a bias by the modules that diffusers has: rows of a fused projection go with its parts."""
    component, path = component_of(module)
    parts = None if component else family.parts(path)
    counts = None if parts is None or module not in adapter else family.rows(path, *adapter.updates[module].shape)
    if parts is None or counts is None:
        yield module, shift
    else:
        yield from zip(parts, torch.split(shift, list(counts)), strict=True)


def _without_place(adapter: LoraData, parameter: str, style: Style) -> OutputError:
    other = " Changes of biases have a place in format='diffusers' too." if parameter.endswith(".bias") else ""
    return OutputError(
        f"adapter {adapter.name!r} changes {parameter} beside its factors, for which files of the dialect "
        f"{style.name!r} have no place; leave such parameters out with `adapter.without_extras()` "
        f"(--drop-extras), or write format='comfy'.{other}"
    )
