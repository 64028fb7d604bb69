"""The dialects of single files: how each calls a module, the two factors and the scale.

A file calls a tensor ``stem + suffix``. The stem of a module is that of the file that it was read from, where that is
known (:class:`~fastlora.core.file_form.FileForm`), else what its dialect makes of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastlora.errors import InputError


@dataclass(frozen=True, slots=True)
class Style:
    """A dialect.

    ``format``: the module of :mod:`fastlora.formats` that reads and writes it. ``down``, ``up``: the suffixes of ``A``
    and ``B``. ``prefix``: of modules of the denoiser; ``None`` stands for the component's own name, ``unet.`` or
    ``transformer.``. ``original``: modules have the names of the original code, not those of diffusers. ``flat``: dots
    are underscores. ``alpha``: scales are stored beside the factors, else they are inside ``B``. ``described``: files
    have ``lora_adapter_metadata`` for diffusers.
    """

    name: str
    format: str
    down: str
    up: str
    prefix: str | None = None
    original: bool = False
    flat: bool = False
    alpha: bool = False
    described: bool = False


def _kohya(name: str, prefix: str, original: bool = False) -> Style:
    return Style(name, "kohya", ".lora_down.weight", ".lora_up.weight", prefix, original, flat=True, alpha=True)


def _a_b(name: str, format: str, prefix: str | None, original: bool = False, described: bool = True) -> Style:
    return Style(name, format, ".lora_A.weight", ".lora_B.weight", prefix, original, described=described)


def _down_up(name: str, format: str, prefix: str | None, original: bool = False) -> Style:
    return Style(name, format, ".lora_down.weight", ".lora_up.weight", prefix, original)


STYLES: Mapping[str, Style] = {
    style.name: style
    for style in (
        _kohya("kohya-original", "lora_unet_", original=True),
        _kohya("kohya-diffusers", "lora_unet_"),
        _kohya("lora_transformer", "lora_transformer_"),
        _kohya("lycoris", "lycoris_"),
        _a_b("component", "diffusers", None),
        _a_b("component-original", "diffusers", None, original=True),
        _down_up("component-down", "diffusers", None),
        Style("lora-dot", "diffusers", ".lora.down.weight", ".lora.up.weight"),
        Style("lora-linear-layer", "diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        Style("processor", "diffusers", "_lora.down.weight", "_lora.up.weight"),
        _a_b("bare", "diffusers", "", described=False),
        _down_up("bare-down", "diffusers", ""),
        _a_b("bare-original", "diffusers", "", original=True, described=False),
        _down_up("bare-original-down", "diffusers", "", original=True),
        _a_b("diffusion_model", "comfy", "diffusion_model.", original=True),
        _down_up("diffusion_model-down", "comfy", "diffusion_model.", original=True),
        _a_b("diffusion_model-diffusers", "comfy", "diffusion_model."),
        _down_up("diffusion_model-diffusers-down", "comfy", "diffusion_model."),
        Style("xlabs", "xlabs", ".down.weight", ".up.weight", "", original=True),
        Style("mlx", "mlx", ".lora_a", ".lora_b", ""),
    )
}
"""By name. ``NAME+alpha`` stores scales where the dialect has them inside ``B`` by default, ``NAME+folded`` has them
inside ``B`` where it stores them by default."""

ALPHA, FOLDED = "+alpha", "+folded"


def style_named(name: str) -> Style:
    """The dialect of that name, :class:`FileForm.style <fastlora.core.file_form.FileForm>`."""
    plain = name.removesuffix(ALPHA).removesuffix(FOLDED)
    if plain not in STYLES:
        raise InputError(f"there is no dialect {name!r} of adapter files; known are {', '.join(STYLES)}")
    style = STYLES[plain]
    return style if plain == name else replace(style, name=name, alpha=name.endswith(ALPHA))


def style_name(plain: str, alpha: bool) -> str:
    """The name of a dialect whose files store scales, or have them inside ``B``."""
    return plain if STYLES[plain].alpha == alpha else plain + (ALPHA if alpha else FOLDED)
