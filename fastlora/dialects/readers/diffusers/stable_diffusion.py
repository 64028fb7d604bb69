"""Stable Diffusion 1, 2 and XL in diffusers."""

from __future__ import annotations

import re

from fastlora.dialects.adapter_metadata import KEY as METADATA
from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.readers.diffusers.direct import hand_over, require_lora, without_dora
from fastlora.dialects.readers.diffusers.handed import Conversion
from fastlora.dialects.verdicts import Refused

KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
ENDS = re.compile(r"conv_in|conv_out|time_embedding\.linear_\d")
"""Modules whose original names are known for every UNet."""
PLACED = re.compile(r"(input_blocks|middle_block|output_blocks)_")
"""Original names that are translated for XL only."""
ATTENTION = re.compile(r".*\.attn\d\.to_(q|k|v|out\.0)")
TEXTS = ("text_encoder", "text_encoder_2")


def convert(file: FileFacts) -> Conversion:
    """What the pipelines of Stable Diffusion make of a file."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if all(key.startswith(KOHYA) for key in keys):
        _kohya(file, keys, conversion)
    else:
        require_lora(keys)
        hand_over(file, conversion, "unet", TEXTS)
    return conversion


def _kohya(file: FileFacts, keys: list[str], conversion: Conversion) -> None:
    owners = file.owners()
    taken: list[ModuleFacts] = []
    for key in keys:
        if not key.endswith(".lora_down.weight") or key not in owners:
            continue
        module = owners[key][0]
        if "up" not in module.keys:
            raise Refused("KeyError", f"{module.stem}.lora_up.weight is not there")
        taken.append(module)
    used = {m.keys[part] for m in taken for part in ("down", "up", "alpha") if part in m.keys}
    unused = next((key for key in keys if key not in used), None)
    if unused is not None:
        raise Refused("ValueError", f"it cannot rename {unused!r}")
    is_xl = file.family != "sd15"
    both = any(_is_diffusers(m) for m in taken) and any(PLACED.match(m.rest) for m in taken)
    for module in taken:
        _hand(module, conversion, is_xl, both)
    if METADATA in file.metadata and any(m.alpha is not None for m in taken):
        raise Refused("ValueError", f"it takes alphas or {METADATA}, not both")
    for component, handed in conversion.handed.items():
        handed.alphas = {m.stem: m.alpha for m in taken if m.named.component == component and m.alpha is not None}
        handed.pattern = _text_pattern if component else _pattern
        if component and not _told_apart([m for m in taken if m.named.component == component]):
            raise Refused("ValueError", f"it cannot tell how the modules of {component} are spelled")


def _hand(module: ModuleFacts, conversion: Conversion, is_xl: bool, both: bool) -> None:
    if module.named.component:
        conversion.take(module)
    elif is_xl and both and PLACED.match(module.rest):
        conversion.drop([module], "it drops original names where there are names of diffusers too")
    elif is_xl and module.in_diffusers_names and module.named.path.startswith("add_embedding"):
        conversion.stray(module, "it does not know this name of diffusers in files of kohya's scripts")
    elif not is_xl and not module.in_diffusers_names and not ENDS.fullmatch(module.named.path):
        conversion.stray(module, "it translates original names for XL only")
    else:
        conversion.take(module)


def _is_diffusers(module: ModuleFacts) -> bool:
    return not module.named.component and module.rest.startswith(("down_blocks_", "mid_block_", "up_blocks_"))


def _pattern(module: ModuleFacts) -> str | None:
    """Alphas of attention are noted under names that no module has."""
    return None if ATTENTION.fullmatch(module.named.path) else module.named.path


def _text_pattern(module: ModuleFacts) -> str | None:
    """The same; those of CLIP-L fit no name either, since that has lost its first word."""
    return None if ".self_attn." in module.named.path else module.named.path


def _told_apart(modules: list[ModuleFacts]) -> bool:
    """Whether a text encoder has one of the modules by which diffusers knows the spelling."""
    return any(m.named.path.endswith((".out_proj", ".fc1", ".fc2")) for m in modules)
