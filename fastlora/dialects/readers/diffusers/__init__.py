"""What diffusers makes of single files: ``load_lora_weights`` of the pipeline of their family, with PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastlora.dialects.file_facts import FileFacts
from fastlora.dialects.readers.diffusers import flux, flux2, others, stable_diffusion, wan
from fastlora.dialects.readers.diffusers.handed import UNSURE, Conversion, settled
from fastlora.dialects.verdicts import Finding, Reading, Refused

TITLE = "diffusers"
VERSION = "0.42"
BASIS = "run, with transformers 5.24"
BY_DEFAULT = True

CONVERSIONS: Mapping[str, Callable[[FileFacts], Conversion]] = {
    **dict.fromkeys(("sd15", "sdxl", "sdxl_refiner"), stable_diffusion.convert),
    "flux": flux.convert,
    "flux2": flux2.convert,
    "sd3": others.stable_diffusion_3,
    "wan": wan.convert,
    "qwen_image": others.qwen_image,
    "z_image": others.z_image,
    "hunyuan_video": others.hunyuan_video,
    "ltx_video": others.ltx_video,
}
"""By family."""


def read(file: FileFacts) -> Reading:
    """What diffusers makes of a file."""
    family = file.family or ""
    try:
        conversion = CONVERSIONS.get(family, others.of_any_model)(file)
        second = file.of("transformer_2")
        conversion.drop(second, "modules of a second transformer need a file and a call of their own")
        return settled(file, conversion, "unet" if family.startswith("sd15") or "sdxl" in family else "transformer")
    except Refused as refused:
        if refused.error == UNSURE:
            return Reading(None, dict.fromkeys(file.modules, Finding("unsure", refused.why)))
        return Reading((refused.error, refused.why))
