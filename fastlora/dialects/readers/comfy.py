"""What ComfyUI makes of single files: it asks the file for every name that it knows of a weight of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.verdicts import Finding, Reading, lost, scaled

TITLE = "ComfyUI"
VERSION = "2026-02"
BASIS = "run"
BY_DEFAULT = True

FACTORS = (
    ".lora_down.weight", "_lora.down.weight", ".lora_A.weight", ".lora.down.weight", ".lora_A",
    ".lora_linear_layer.down.weight", ".lora_A.default.weight",
)  # fmt: skip
"""How an ``A`` may end."""
XLABS = ("single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight")
"""The tensors by which it knows a file of XLabs."""
WAN_FUN = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"
"""The tensor by which it knows a file of Wan-Fun."""
DIFFUSERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd15", "sdxl", "sdxl_refiner"), ("lora_unet_", "lycoris_", "unet.", "")),
    "sd3": ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"),
    **dict.fromkeys(("flux", "flux2"), ("transformer.", "lora_transformer_", "lycoris_")),
    "qwen_image": ("transformer.", "lycoris_", ""),
    "z_image": ("transformer.", "lycoris_", "diffusion_model."),
}
"""By family: prefixes before names of diffusers."""
ORIGINAL = ("lora_unet_", "diffusion_model.")
"""Prefixes before original names."""
ALSO_ORIGINAL: Mapping[str, tuple[str, ...]] = {"hunyuan_video": ("transformer.",), "hidream": ("transformer.",)}
UNTRIED: Mapping[str, tuple[str, ...]] = {"flux": ("",), "flux2": ("",), "z_image": ("",), "ltx_video": ("",)}
"""By family: prefixes that some versions know."""
TRIED = (*DIFFUSERS, "wan", "hunyuan_video", "ltx_video")
"""Families whose names were tried."""
FLUX2_UNKNOWN = re.compile(r"time_guidance_embed\..+|.+_stream_modulation(_img|_txt)?\.linear|.+_modulation\.linear")
CONTROL = re.compile(r"distilled_guidance_layer\..+")
RENAMED = re.compile(r".*(mlp_fc[12]|_mod_linear|modulation_linear)")
"""Flat names of HunyuanVideo that it has changed in the model."""
EMBEDDERS = re.compile(r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.\d|txt_in\.c_embedder\.linear_\d")
"""Original names of HunyuanVideo that it has changed in the model without taking the old ones."""
LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
CLIP: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
"""Prefixes of CLIP-L and CLIP-G."""
GENERIC = "text_encoders."
PROJECTIONS = ("lora_te1_text_projection", "lora_te2_text_projection")


def read(file: FileFacts) -> Reading:
    """What ComfyUI makes of a file."""
    findings: dict[str, Finding] = {}
    for stem, module in file.modules.items():
        if "up" in module.keys and "down" not in module.keys:
            return Reading(("KeyError", f"the lora_down of {stem!r} is not there"))
        finding = _text(file, module) if module.named.component else _denoiser(file, module)
        finding = finding or _change(module)
        if finding is not None:
            findings[stem] = finding
    findings |= _on_second_names(file, findings)
    return Reading(None, findings)


def _on_second_names(file: FileFacts, findings: Mapping[str, Finding]) -> dict[str, Finding]:
    """Of two names of one weight, that of diffusers counts; of a projection and its parts, both do."""
    known = [m for stem, m in file.modules.items() if stem not in findings]
    last: dict[str, ModuleFacts] = {}
    for module in sorted(known, key=lambda m: m.prefix not in ORIGINAL):
        last[module.named.module] = module
    found = {m.stem: lost("another name of the same module counts") for m in known if last[m.named.module] is not m}
    for module in known:
        if any(part in last for part in module.parts):
            found[module.stem] = Finding("wrong", "it adds this projection to its parts, which are in the file too")
    return found


def _change(module: ModuleFacts) -> Finding | None:
    """What it makes of the tensors of a module whose name it knows."""
    if "down" in module.keys and module.suffix not in (*FACTORS, ".down.weight"):
        return lost(f"it does not know factors called {module.suffix[1:]}")
    if "down" in module.keys and "up" not in module.keys:
        return lost("one factor is not there")
    if "lokr_t2" in module.keys:
        return lost("with torch 2.13 it fails on LoKr with lokr_t2, tells so in its log only, and goes on")
    if "magnitude" in module.keys:
        return Finding("wrong", "it drops the magnitudes of DoRA, and takes the rest for a plain LoRA")
    shape = module.shapes.get("dora_scale")
    if shape is not None and (len(shape) < 2 or (shape[0] != 1 and shape[1] == 1)):
        return Finding("wrong", "it divides by the norm of W in place of that of W + ΔW (DoRA over rows)")
    if "up_bias" in module.keys:
        return Finding("wrong", "it drops the change of the bias (lora_B.bias)")
    if {"up", "down"} <= module.keys.keys():
        return scaled(module.meant, module.own_scale, "it scales by alpha / rank alone, and reads no metadata")
    return None


def _denoiser(file: FileFacts, module: ModuleFacts) -> Finding | None:
    family, prefix = file.family or "", module.prefix
    if module.named.component:
        return lost("a second transformer is a model of its own to it")
    if "processor." in module.rest and module.suffix == ".down.weight":
        known = all(key in file.keys for key in XLABS)
        return None if known else lost(f"it knows files of XLabs by {XLABS[0]} and {XLABS[1]} alone")
    if prefix == "lora_unet__":
        return None if WAN_FUN in file.keys else lost(f"it knows files of Wan-Fun by {WAN_FUN} alone")
    if prefix in (*ORIGINAL, *ALSO_ORIGINAL.get(family, ())) and module.in_original_names:
        if module.is_flat and family == "hunyuan_video" and RENAMED.fullmatch(module.rest):
            return lost("it has changed this name in the model, and takes the old one dotted only")
        if family == "hunyuan_video" and EMBEDDERS.fullmatch(module.original or ""):
            return lost("it has changed this name in the model, and does not take the old one")
        return None
    if prefix in DIFFUSERS.get(family, ()) and module.in_diffusers_names:
        return _in_diffusers_names(family, module)
    if prefix in UNTRIED.get(family, ()) or family not in TRIED:
        return Finding("unsure", "what it makes of names that begin so was not tried, or depends on its version")
    if family == "ltx_video" and prefix == "diffusion_model." and module.in_diffusers_names:
        return lost("outside the blocks it has the names of the original code, and this is one of diffusers")
    spelled = "of diffusers" if module.in_diffusers_names else "of the original code"
    return lost(
        f"it knows no names {spelled} after {prefix!r}" if prefix else f"it knows no names {spelled} without prefix"
    )


def _in_diffusers_names(family: str, module: ModuleFacts) -> Finding | None:
    path = module.named.path
    if family.startswith("sd") and family != "sd3" and not module.is_flat:
        if ".to_" in path and ".processor." not in module.rest:
            return lost("it takes attention's q, k, v and out only under names with .processor.")
    if (family == "flux2" and FLUX2_UNKNOWN.fullmatch(path)) or CONTROL.fullmatch(path):
        return lost("its table of names of diffusers lacks it")
    if module.parts:
        return lost("its table of names of diffusers has the parts of this projection only")
    return None


def _text(file: FileFacts, module: ModuleFacts) -> Finding | None:
    component, path = module.named.component, module.named.path
    if module.prefix.startswith(GENERIC):
        return None
    if component.startswith("transformer"):
        return lost("a second transformer is a model of its own to it")
    if path == "text_projection":
        return None if module.stem in PROJECTIONS else lost("it knows this name after lora_te1_ and lora_te2_ only")
    if path.startswith("encoder.block."):
        if module.prefix == "lora_te3_" or (module.prefix == "lora_te2_" and file.family == "flux"):
            return None
        return lost("it knows names of T5 after lora_te3_ only")
    if not LAYER.fullmatch(path):
        return Finding("unsure", "what it makes of this text encoder was not tried")
    if module.prefix not in CLIP.get(component, ()):
        return lost(f"it knows no names of this text encoder after {module.prefix!r}")
    if module.rest.replace("_", ".") != path.replace("_", "."):
        return lost("it knows these names with text_model, and projections as q_proj, only")
    return None
