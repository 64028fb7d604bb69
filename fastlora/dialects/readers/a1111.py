"""What the web UI of AUTOMATIC1111 makes of single files for Stable Diffusion 1, 2 and XL. Forge agrees on these, and
reads Flux as an older ComfyUI."""

from __future__ import annotations

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.verdicts import NO_MODEL, Finding, Reading, lost, scaled

TITLE = "A1111, Forge"
VERSION = "2026"
BASIS = "their code"
BY_DEFAULT = True

FAMILIES = ("sd15", "sdxl", "sdxl_refiner")
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
FACTORS = (".lora_down.weight", ".lora_A.weight")


def read(file: FileFacts) -> Reading:
    """What A1111 makes of a file."""
    if file.family not in FAMILIES:
        return Reading((NO_MODEL, "its own extension for LoRA is for Stable Diffusion 1, 2 and XL"))
    found = {stem: _module(module) for stem, module in file.modules.items()}
    return Reading(None, {stem: finding for stem, finding in found.items() if finding is not None})


def _module(module: ModuleFacts) -> Finding | None:
    if module.prefix not in PREFIXES:
        return lost("it cuts names at their first dot, and knows those of kohya's scripts only")
    if "down" in module.keys and module.suffix not in FACTORS:
        return lost(f"it does not know factors called {module.suffix[1:]}")
    if not module.named.component and module.in_diffusers_names and module.named.path.startswith("add_embedding"):
        return lost("its table of names of diffusers lacks it")
    shape = module.shapes.get("dora_scale")
    if shape is not None and not (len(shape) > 1 and shape[0] == 1):
        return Finding("wrong", "it knows DoRA over columns only")
    if "scale" in module.keys:
        return Finding("unsure", "a tensor .scale replaces alpha / rank")
    if {"up", "down"} <= module.keys.keys():
        return scaled(module.meant, module.own_scale, "it scales by alpha / rank alone")
    return None
