"""Wan in diffusers."""

from __future__ import annotations

import re

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.readers.diffusers.direct import hand_over, require_lora, without_dora
from fastlora.dialects.readers.diffusers.handed import Conversion
from fastlora.dialects.verdicts import Refused

ATTENTION = ("q", "k", "v", "o")
BLOCK = (*(f"{side}_attn.{leaf}" for side in ("self", "cross") for leaf in ATTENTION), "ffn.0", "ffn.2")
IMAGE = ("cross_attn.k_img", "cross_attn.v_img")
TOP = ("time_projection.1", "head.head", *(f"{what}_embedding.{n}" for what in ("text", "time") for n in (0, 2)))
IMAGE_TOP = ("img_emb.proj.1", "img_emb.proj.3")
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def convert(file: FileFacts) -> Conversion:
    """What the pipelines of Wan make of a file."""
    conversion = Conversion()
    if file.starts("diffusion_model."):
        _original(file, conversion)
    elif file.starts("lora_unet_"):
        _musubi(file, conversion)
    else:
        require_lora(without_dora(file, conversion))
        hand_over(file, conversion, "transformer")
    return conversion


def _has_image(file: FileFacts) -> bool:
    return file.has("k_img") and file.has("v_img")


def _original(file: FileFacts, conversion: Conversion) -> None:
    if not any(IN_BLOCK.fullmatch(m.rest) for m in file.modules.values()):
        raise Refused("ValueError", "no module is in a block")
    leaves = (*BLOCK, *IMAGE) if _has_image(file) else BLOCK
    letters = file.has("lora_A")
    time_projection = any(m.rest.startswith("time_projection") and m.rank for m in file.modules.values())
    for module in file.modules.values():
        if "norm" in module.stem and module.keys.keys() <= {"diff", "diff_b"}:
            conversion.drop([module], "it drops changes of norms")
            continue
        if "time_projection" in module.stem and not time_projection:
            conversion.drop([module], "it drops the bias of time_projection where there is no weight")
            continue
        if module.prefix != "diffusion_model." or not module.keys.keys() <= {"down", "up", "alpha", "diff_b"}:
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
        if {"down", "up"} <= module.keys.keys():
            if module.suffix != (".lora_A.weight" if letters else ".lora_down.weight"):
                raise Refused("ValueError", "lora_A and lora_down are in one file")
        block = IN_BLOCK.fullmatch(module.rest)
        if block is not None and block[2] in leaves:
            conversion.bake(module, multiplies=False)
        elif module.rest in TOP or module.rest in IMAGE_TOP:
            if "alpha" in module.keys:
                raise Refused("ValueError", f"outside the blocks it expects no alpha: {module.stem!r}")
            conversion.take(module)
        else:
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")


def _musubi(file: FileFacts, conversion: Conversion) -> None:
    modules: dict[str, ModuleFacts] = {}
    blocks: set[str] = set()
    for module in file.modules.values():
        _, found, rest = module.rest.partition("blocks_")
        if not found:
            raise Refused("IndexError", f"{module.stem!r} is in no block")
        blocks.add(rest.partition("_")[0])
        modules[module.rest] = module
    leaves = [leaf.replace(".", "_") for leaf in ((*BLOCK, *IMAGE) if _has_image(file) else BLOCK)]
    needed = {f"blocks_{i}_{leaf}" for i in range(len(blocks)) for leaf in leaves}
    for name in sorted(needed):
        if name not in modules or not {"down", "up", "alpha"} <= modules[name].keys.keys():
            raise Refused("KeyError", f"it needs every module of every block with its alpha, and {name!r} lacks it")
    more = next((m for n, m in modules.items() if n not in needed or len(m.keys) > 3), None)
    if more is not None:
        raise Refused("ValueError", f"it does not know what to do with {more.stem!r}")
    for module in modules.values():
        conversion.bake(module)
