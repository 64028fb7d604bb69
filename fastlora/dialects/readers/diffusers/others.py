"""Stable Diffusion 3, Qwen-Image, Z-Image, HunyuanVideo and LTX-Video in diffusers, and what it reads of any model."""

from __future__ import annotations

import math
import re

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.readers.diffusers.direct import (
    PEFT,
    hand_over,
    hand_to_denoiser,
    require_lora,
    without_dora,
)
from fastlora.dialects.readers.diffusers.handed import Conversion
from fastlora.dialects.verdicts import Finding, Refused

DOWN, DOTTED = ".lora_down.weight", ".lora.down.weight"
HUNYUAN_WIDTH = 3072
HUNYUAN_PREFIXES = ("transformer.", "diffusion_model.", "")


def stable_diffusion_3(file: FileFacts) -> Conversion:
    """Nothing is translated."""
    conversion = Conversion()
    require_lora(without_dora(file, conversion))
    hand_over(file, conversion, "transformer", ("text_encoder", "text_encoder_2"))
    return conversion


def of_any_model(file: FileFacts) -> Conversion:
    """What holds for models without rules of their own here: names of the diffusers model, without alphas."""
    conversion = Conversion()
    if not file.starts("transformer."):
        why = "what it makes of other names than those of the diffusers model was not tried for this model"
        conversion.wrong |= dict.fromkeys(file.modules, Finding("unsure", why))
        return conversion
    require_lora(without_dora(file, conversion))
    hand_over(file, conversion, "transformer")
    return conversion


def ltx_video(file: FileFacts) -> Conversion:
    """Only the prefix is translated."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if not file.starts("diffusion_model."):
        require_lora(keys)
        hand_over(file, conversion, "transformer")
        return conversion
    if not all(key.startswith("diffusion_model.") for key in keys):
        raise Refused("ValueError", "some names do not begin with diffusion_model.")
    require_lora(keys)
    modules = list(file.modules.values())
    hand_to_denoiser(modules, conversion, "lora_A" in keys[0])
    return conversion


def qwen_image(file: FileFacts) -> Conversion:
    """Alphas go into the factors, and every prefix but ``transformer.`` is translated."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if not _is_translated(file, keys):
        require_lora(keys)
        hand_over(file, conversion, "transformer")
        return conversion
    _pairs(file, conversion)
    return conversion


def _is_translated(file: FileFacts, keys: list[str]) -> bool:
    return (
        any(key.endswith(".alpha") for key in keys)
        or file.starts("lora_unet_", "diffusion_model.")
        or file.has("default.")
    )


def _pairs(file: FileFacts, conversion: Conversion) -> None:
    """``A`` and ``B`` with alpha inside, under one spelling of the factors."""
    suffix = DOWN if file.has(DOWN) else PEFT
    for module in file.modules.values():
        _require_pair(module, suffix)
        if module.in_diffusers_names and module.prefix in ("lora_unet_", "diffusion_model.", ""):
            conversion.bake(module)
        else:
            conversion.stray(module)


def _require_pair(module: ModuleFacts, *suffixes: str) -> None:
    if not module.keys.keys() <= {"down", "up", "alpha", "dora_scale"}:
        raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
    if not {"down", "up"} <= module.keys.keys():
        raise Refused("KeyError", f"{module.stem!r} has one factor only")
    if module.suffix.replace(".default.", ".") not in suffixes:
        raise Refused("ValueError", f"{module.stem!r} spells its factors otherwise than other modules")


def z_image(file: FileFacts) -> Conversion:
    """As Qwen-Image; a fused projection is cut where its name is flat."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if any(".lokr_" in key for key in keys):
        why = "it reads LoKr of Z-Image in some spellings, which is not followed here"
        conversion.wrong |= dict.fromkeys(file.modules, Finding("unsure", why))
        return conversion
    if not _is_translated(file, keys):
        require_lora(keys)
        hand_over(file, conversion, "transformer")
        return conversion
    suffix = DOWN if file.has(DOWN) or file.starts("lora_unet_") else PEFT
    for module in file.modules.values():
        _require_pair(module, suffix, DOTTED)
        _hand_z_image(module, conversion)
    return conversion


def _hand_z_image(module: ModuleFacts, conversion: Conversion) -> None:
    is_output = module.rest.endswith(("attention.out", "attention_out"))
    is_dotted = module.is_flat or module.suffix == DOTTED  # flat names become these
    is_renamed = is_dotted or module.suffix == DOWN
    if is_output and module.alpha is not None and not is_renamed:
        raise Refused("ValueError", f"it does not find the factors of the alpha of {module.stem!r}")
    if module.prefix not in ("lora_unet_", "diffusion_model.", ""):
        conversion.stray(module)
    elif module.in_diffusers_names or (is_output and is_renamed):
        conversion.bake(module)
    elif is_dotted and module.rest.endswith(("attention_qkv", "attention.qkv")):
        conversion.bake(module)
    else:
        conversion.stray(module)


def hunyuan_video(file: FileFacts) -> Conversion:
    """Original names are translated where one of them is ``img_attn_qkv``; alphas are not expected."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if not any("img_attn_qkv" in key for key in keys):
        require_lora(keys)
        hand_over(file, conversion, "transformer")
        return conversion
    for module in file.modules.values():
        _check_hunyuan(module)
    require_lora(keys)
    for module in file.modules.values():
        _hand_hunyuan(module, conversion)
    return conversion


def _check_hunyuan(module: ModuleFacts) -> None:
    is_fused = re.search(r"(img|txt)_attn_qkv|self_attn_qkv", module.stem) is not None
    if is_fused and module.alpha is not None:
        raise Refused("RuntimeError", f"it cuts the alpha of {module.stem!r} in three")
    if module.suffix != PEFT and is_fused:
        thirds = math.ceil(module.rank / math.ceil(module.rank / 3)) if module.rank else 0
        if thirds < 3 or module.prefix in HUNYUAN_PREFIXES:
            whole = "RuntimeError" if module.suffix == DOTTED else "IndexError"
            error = whole if thirds == 3 else "ValueError"
            raise Refused(error, f"it cuts both factors of {module.stem!r} in three")


def _hand_hunyuan(module: ModuleFacts, conversion: Conversion) -> None:
    if module.prefix not in HUNYUAN_PREFIXES or module.suffix != PEFT:
        conversion.stray(module)
        return
    path = module.named.path
    if path.endswith("to_qkv_mlp_proj") and module.rows <= 3 * HUNYUAN_WIDTH:
        raise Refused("RuntimeError", f"it takes a width of {HUNYUAN_WIDTH} for granted, and {module.stem!r} has less")
    conversion.take(module)
    if module.named.original and path == "norm_out.linear":
        why = "it exchanges the two halves of the rank as well as those of the rows"
        conversion.wrong[module.stem] = Finding("wrong", why)
    elif "self_attn_qkv" in module.stem:
        conversion.wrong[module.stem] = Finding("wrong", "it cuts the rank in three as well as the rows")
