"""Which dialect a file is in, for a result that is to be written in the same."""

from __future__ import annotations

from collections.abc import Iterable

from fastlora.dialects.family import Family
from fastlora.dialects.looks import Looks
from fastlora.dialects.named_modules import Modules
from fastlora.dialects.naming import Named
from fastlora.dialects.spelling import style_name

DOWN = ("down", "lora-dot", "lora-linear-layer")


def style_of(looks: Looks, spelling: str, known: Modules, alpha: bool) -> str:
    """The name of the dialect, as :mod:`fastlora.dialects.spelling` has it."""
    return style_name(_plain(looks, spelling, known), alpha)


def _plain(looks: Looks, spelling: str, known: Modules) -> str:
    if looks.format == "xlabs":
        return "xlabs"
    denoiser = [n for n in known.named.values() if not n.component]
    original = _is_original(denoiser, known.family, default=looks.format != "diffusers")
    down = spelling == "down"
    if looks.format == "kohya":
        if looks.prefix in ("lora_transformer_", "lycoris_"):
            return looks.prefix.removesuffix("_")
        return "kohya-original" if original else "kohya-diffusers"
    if looks.format == "comfy":
        return "diffusion_model" + ("" if original else "-diffusers") + ("-down" if down else "")
    if spelling in ("processor", "lora-dot", "lora-linear-layer"):
        return spelling
    if looks.prefix == "":
        return "bare" + ("-original" if original else "") + ("-down" if down else "")
    return "component" + ("-original" if original else "-down" if down else "")


def _is_original(modules: Iterable[Named], family: Family | None, *, default: bool) -> bool:
    """Whether modules have the names of the original code. Where both are the same, ``default``."""
    modules = list(modules)
    if any(m.original for m in modules):
        return True
    if family is None or not modules:
        return default
    others = ((m.path, family.original(m.path)) for m in modules)
    return default and all(found is None or found[0] == path for path, found in others)
