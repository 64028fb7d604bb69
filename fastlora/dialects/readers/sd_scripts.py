"""What the scripts of kohya (sd-scripts) make of single files: ``networks.lora`` and its kin, from weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.verdicts import NO_MODEL, Finding, Reading, lost, scaled

TITLE = "sd-scripts"
VERSION = "2026-11"
BASIS = "run for the UNet of Stable Diffusion 1, else their code"
BY_DEFAULT = False  # they train and merge, and take files of their own dialect alone

SUFFIX = ".lora_down.weight"
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_conditioner": ("lora_unet_llm_adapter_",),
}
"""By component; the T5 of Flux and of Stable Diffusion 3 is ``lora_te3_``."""
UNET_ENDS = re.compile(r"(conv_in|conv_out|time_embedding|add_embedding)\b.*")
"""Modules that lie in no attention, resnet or sampler."""
TOP = re.compile(r"norm_out\.linear|proj_out")
FAMILIES = ("sd15", "sdxl", "flux", "sd3", "lumina2", "cosmos")
"""Of Cosmos-Predict2 they have Anima."""
NEED_ALPHAS = ("flux", "sd3", "lumina2", "cosmos")
"""Families whose network is made from the alphas of a file."""


def read(file: FileFacts) -> Reading:
    """What sd-scripts make of a file."""
    family = file.family or ""
    if family not in FAMILIES:
        return Reading((NO_MODEL, "they have no models of this family"))
    if family in NEED_ALPHAS and file.starts("lora_unet_"):
        bare = next((m for m in file.modules.values() if m.suffix == SUFFIX and m.alpha is None), None)
        if bare is not None:
            return Reading(("KeyError", f"the alpha of {bare.stem!r} is not there"))
    found = {stem: _module(family, module) for stem, module in file.modules.items()}
    return Reading(None, {stem: finding for stem, finding in found.items() if finding is not None})


def _module(family: str, module: ModuleFacts) -> Finding | None:
    component, path = module.named.component, module.named.path
    is_t5 = path.startswith("encoder.block.")
    if module.prefix not in (("lora_te3_",) if is_t5 else PREFIXES.get(component, ())):
        return lost(f"they know names after {', '.join(PREFIXES['text_encoder' if component else ''])} only")
    if not component and not _is_known(family, module):
        return lost("they do not train this module, or call it otherwise")
    is_top_of_conditioner = component == "text_conditioner" and not path.startswith("blocks.")
    if path == "text_projection" or is_top_of_conditioner:
        return lost("they do not train this module")
    if not {"up", "down"} <= module.keys.keys() or module.suffix != SUFFIX or "mid" in module.keys:
        return lost("it is no plain LoRA; they read LyCORIS through the package lycoris only")
    if "dora_scale" in module.keys:
        return Finding("wrong", "they drop the dora_scale")
    if module.alpha == 0.0:
        return scaled(module.meant, 1.0, "an alpha of 0 is none to them, so the scale is 1")
    return scaled(module.meant, module.own_scale, "they scale by alpha / rank alone")


def _is_known(family: str, module: ModuleFacts) -> bool:
    if family == "sd15":
        return module.in_diffusers_names and not UNET_ENDS.match(module.named.path)
    if not module.in_original_names:
        return False
    if family == "sdxl":
        return not UNET_ENDS.match(module.named.path)
    return family != "flux" or not TOP.fullmatch(module.named.path)
