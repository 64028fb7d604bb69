"""Flux.2 in diffusers."""

from __future__ import annotations

from fastlora.dialects.file_facts import FileFacts
from fastlora.dialects.readers.diffusers.direct import OLDER, PEFT, hand_over, require_lora, without_dora
from fastlora.dialects.readers.diffusers.handed import Conversion
from fastlora.dialects.verdicts import Finding, Refused

KOHYA_TOP = {
    "x_embedder", "context_embedder", "proj_out",
    "time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.timestep_embedder.linear_2",
}  # fmt: skip
"""Modules outside the blocks that it takes out of files of kohya's scripts."""
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def convert(file: FileFacts) -> Conversion:
    """What the pipelines of Flux.2 make of a file."""
    conversion = Conversion()
    keys = without_dora(file, conversion)
    if any(".lora_down.weight" in key for key in keys):
        _kohya(file, conversion)
    elif any(".lokr_" in key for key in keys):
        why = "it reads LoKr of Flux.2 in some spellings, which is not followed here"
        conversion.wrong |= dict.fromkeys(file.modules, Finding("unsure", why))
    elif file.starts("diffusion_model.", "base_model.model."):
        _original(file, conversion)
    else:
        require_lora(keys, "lokr")
        hand_over(file, conversion, "transformer")
    return conversion


def _kohya(file: FileFacts, conversion: Conversion) -> None:
    for module in file.modules.values():
        path = module.named.path
        if module.prefix != "lora_unet_" or module.named.component:
            conversion.drop([module], "beside lora_down it takes names with lora_unet_ only")
        elif module.in_diffusers_names or not (path.startswith(BLOCKS) or path in KOHYA_TOP):
            conversion.drop([module], "it does not know this name in files of kohya's scripts")
        elif "down" not in module.keys:
            conversion.drop([module], "it takes plain factors only")
        elif "up" not in module.keys:
            raise Refused("KeyError", f"{module.stem}.lora_up.weight is not there")
        else:
            conversion.bake(module)


def _original(file: FileFacts, conversion: Conversion) -> None:
    for module in file.modules.values():
        if module.prefix not in ("diffusion_model.", "base_model.model."):
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
        if not module.keys.keys() <= {"down", "up", "dora_scale"}:
            raise Refused("ValueError", f"beside the factors it does not expect anything: {module.stem!r}")
        passes = module.in_diffusers_names and module.named.path.startswith(BLOCKS)  # as it is
        if module.suffix not in (PEFT, *OLDER * passes):
            raise Refused("ValueError", f"it does not know factors called as those of {module.stem!r}")
        if module.in_diffusers_names and not passes:
            raise Refused("ValueError", f"it does not know what to do with {module.stem!r}")
        conversion.take(module)
        if module.named.swapped:
            why = "it does not exchange the two halves of its rows, which diffusers has in the other order"
            conversion.wrong[module.stem] = Finding("wrong", why)
