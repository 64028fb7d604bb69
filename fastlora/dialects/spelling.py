"""The dialects of single files: how each calls a module, the two factors and the scale.

A file calls a tensor ``stem + suffix``. The stem of a module is that of the file that it was read from, where that is
known (:class:`~fastlora.core.file_form.FileForm`), else what its dialect makes of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastlora.dialects.family import Family
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


COMPONENTS = frozenset(f"{c}{n}" for c in ("text_encoder", "transformer", "prior") for n in ("", "_2", "_3"))
"""Names of components that a module's name may begin with; those of the denoiser begin with none."""

UNETS = frozenset({"sd15", "sdxl", "sdxl_refiner"})
"""Families whose denoiser diffusers calls ``unet``."""


def component_of(module: str) -> tuple[str, str]:
    """``(component, path)`` of a module's name; the component of the denoiser is ``""``."""
    first, dot, rest = module.partition(".")
    return (first, rest) if dot and first in COMPONENTS else ("", module)


def denoiser(family: Family) -> str:
    """What diffusers calls the denoiser of a family's pipelines."""
    return "unet" if family.name in UNETS else "transformer"


def stem_of(module: str, style: Style, family: Family, shape: tuple[int, int] | None) -> str | None:
    """What a dialect calls a module; ``None`` where it has no name for it, as for the parts of what it has fused.

    ``shape``: of the module's weight.
    """
    component, path = component_of(module)
    if component:
        prefix = _text_prefix(component, style, family)
        return None if prefix is None else prefix + (path.replace(".", "_") if style.flat else path)
    if style.name == "xlabs":
        return _xlabs(path)
    if style.original:
        known = family.original(path, shape)
        if known is None:
            return None
        path = known[0]
    elif family.parts(path) is not None:
        return None
    elif style.name == "processor":
        path = _processor(path)
        if not path:
            return None
    prefix = f"{denoiser(family)}." if style.prefix is None else style.prefix
    return prefix + (path.replace(".", "_") if style.flat else path)


def is_swapped(module: str, stem: str, family: Family, shape: tuple[int, int] | None) -> bool:
    """Whether the file that calls a module by this stem has the two halves of its rows in the other order."""
    component, path = component_of(module)
    known = None if component else family.original(path, shape)
    if known is None or not known[1]:
        return False
    # The original name, and not that of diffusers, tells; flat, since a stem may be either.
    return f".{stem}".replace(".", "_").endswith("_" + known[0].replace(".", "_"))


def _text_prefix(component: str, style: Style, family: Family) -> str | None:
    """What stands before the modules of another component than the denoiser."""
    if style.format in ("diffusers", "peft") and style.prefix is None:
        return f"{component}."
    names = [name for name, held in family.text_encoders.items() if any(c == component for c, _ in held)]
    if style.format == "kohya":
        flat = [name for name in ("te1", "te3", "te2", "te") if name in names]
        alone = not any(c != "text_encoder" for held in family.text_encoders.values() for c, _ in held)
        if alone and "te" in flat:
            return "lora_te_"
        return f"lora_{flat[0]}_" if flat else None
    if style.format == "comfy":
        own = [n for n in names if not n.startswith(("te", "text_encoder"))]
        return f"text_encoders.{own[0]}.transformer." if own else None
    return None


_XLABS = {
    "double": {
        "to_qkv": "qkv_lora1",
        "to_added_qkv": "qkv_lora2",
        "to_out.0": "proj_lora1",
        "to_add_out": "proj_lora2",
    },
    "single": {"attn.to_qkv": "qkv_lora", "proj_out": "proj_lora"},
}


def _xlabs(path: str) -> str | None:
    """The stem of an attention processor of XLabs' trainer."""
    kind, _, rest = path.partition(".")
    number, _, leaf = rest.partition(".")
    if kind == "transformer_blocks" and leaf.startswith("attn."):
        name = _XLABS["double"].get(leaf.removeprefix("attn."))
        return None if name is None else f"double_blocks.{number}.processor.{name}"
    name = _XLABS["single"].get(leaf) if kind == "single_transformer_blocks" else None
    return None if name is None else f"single_blocks.{number}.processor.{name}"


def _processor(path: str) -> str:
    """The path of a projection of an attention as its processor has it; none for other modules."""
    parent, dot, leaf = path.removesuffix(".0").rpartition(".")
    is_attention = (
        dot and parent.rpartition(".")[2] in ("attn1", "attn2") and leaf in ("to_q", "to_k", "to_v", "to_out")
    )
    return f"{parent}.processor.{leaf}" if is_attention else ""
