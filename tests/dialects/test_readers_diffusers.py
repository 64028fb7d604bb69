"""What is said of diffusers is what diffusers does: each file is given to the real loader of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import loaded, shapes
from spelled_files import (
    COMFY,
    EACH,
    HALF,
    KOHYA,
    MISSING,
    NONE,
    ONE,
    ORIGINAL,
    RANK,
    TRANSFORMER,
    UNET,
    Spelling,
    Written,
    written,
)
from torch import Tensor

from fastlora.dialects.adapter_metadata import KEY
from fastlora.dialects.families import family_named
from fastlora.dialects.file_facts import facts_of
from fastlora.dialects.readers import all_readers
from fastlora.dialects.verdicts import Finding

CLOSE = 1e-5
"""Relative to the norm: diffusers computes products, scales and sums in float32."""
MIXED = (2, 3, 6)
BLOCK = r"attentions\.0\.transformer_blocks\.0|resnets\.1|samplers|conv_in|conv_out|time_emb|add_emb|text_encoder"
BLOCKS = r"blocks\.|layers\."
FUSED_MLP = r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"
"""Diffusers knows the fused projection of single blocks at the published width alone."""
REFINER = rf"{FUSED_MLP}|token_refiner.*attn\.to_[qkv]"


def metadata_of(component: str, r: int, lora_alpha: int, **more: object) -> dict[str, str]:
    fields = {"r": r, "lora_alpha": lora_alpha, "target_modules": ["to_q"], **more}
    return {KEY: json.dumps({f"{component}.{key}": value for key, value in fields.items()})}


def case(family: str, name: str, spelling: Spelling, *arguments: object, **options: object) -> object:
    return pytest.param(family, spelling, arguments, options, id=f"{family}: {name}")


ATTENTION = r"attn1\.to_"
A_B = replace(COMFY, folded=False)
DOWN = replace(COMFY, factors="down", folded=False)
BARE = replace(TRANSFORMER, prefix="")
CASES = [
    case("sd15", "kohya", KOHYA, HALF, only=BLOCK),
    case("sd15", "one alpha, ranks differ", KOHYA, ONE, MIXED, only=BLOCK),
    case("sd15", "alpha is the rank", KOHYA, RANK, MIXED, only=BLOCK),
    case("sd15", "alphas differ", KOHYA, EACH, only=BLOCK),
    case("sd15", "alphas missing", KOHYA, MISSING, MIXED, only=BLOCK),
    case("sd15", "no alphas", KOHYA, NONE, MIXED, only=BLOCK),
    case("sd15", "original names", ORIGINAL, HALF, only=BLOCK),
    case("sd15", "original names of blocks alone", ORIGINAL, HALF, only=r"mid_block\.resnets"),
    case("sd15", "text encoder without what tells the spelling", KOHYA, HALF, only=r"text_encoder.*[qk]_proj"),
    case("sd15", "alphas and metadata", KOHYA, HALF, only=BLOCK, metadata=metadata_of("unet", 3, 3)),
    case("sd15", "unet.*.lora.down", replace(UNET, factors="dot"), HALF, only=BLOCK, without="text_encoder"),
    case("sd15", "attention processors", replace(UNET, factors="processor"), HALF, only=ATTENTION),
    case("sd15", "unet.*.lora_A", UNET, HALF, MIXED, only=BLOCK),
    case("sd15", "unet.*.lora_A.default", replace(UNET, factors="default"), only=BLOCK, without="text_encoder"),
    case("sd15", "unet.*.lora_A with alpha", replace(UNET, folded=False), HALF, only=BLOCK),
    case("sd15", "unet.*.lora_A, text_encoder.*.lora_linear_layer", replace(UNET, factors="linear"), only="text_enc"),
    case("sd15", "metadata with a scale", UNET, HALF, only=ATTENTION, metadata=metadata_of("unet", 3, 12)),
    case("sd15", "metadata with rsLoRA", UNET, only=ATTENTION, metadata=metadata_of("unet", 3, 12, use_rslora=True)),
    case("sd15", "metadata of another component", UNET, only=ATTENTION, metadata=metadata_of("text_encoder", 3, 3)),
    case("sd15", "diffusion_model.", COMFY, HALF, only=BLOCK),
    case("sdxl", "kohya", ORIGINAL, HALF, only=BLOCK),
    case("sdxl", "alpha is the rank", ORIGINAL, RANK, MIXED, only=BLOCK),
    case("sdxl", "alphas differ", ORIGINAL, EACH, only=BLOCK),
    case("sdxl", "names of diffusers", KOHYA, HALF, only=BLOCK),
    case("sdxl", "unet.*.lora_A", UNET, HALF, MIXED, only=BLOCK),
    case("sdxl", "diffusion_model.", COMFY, HALF, only=BLOCK),
    case("flux", "kohya", ORIGINAL, EACH, MIXED, only=f"{BLOCKS}|text", without=FUSED_MLP),
    case("flux", "kohya, all modules", ORIGINAL, HALF, without=FUSED_MLP),
    case("flux", "kohya, names of diffusers", KOHYA, HALF, only=BLOCKS),
    case("flux", "kohya with metadata", ORIGINAL, HALF, only=r"\.norm", metadata=metadata_of("transformer", 3, 12)),
    case("flux", "diffusion_model.*.lora_down", DOWN, HALF, only=BLOCKS, without=FUSED_MLP),
    case("flux", "diffusion_model.*.lora_A", A_B, HALF, only=BLOCKS, without=FUSED_MLP),
    case("flux", "transformer.*", TRANSFORMER, HALF, MIXED),
    case("flux", "transformer.* with alpha", replace(TRANSFORMER, folded=False), EACH, MIXED),
    case("flux", "transformer.*.lora_down", replace(TRANSFORMER, factors="down", folded=False), HALF, without="text"),
    case("flux", "lora_transformer_, attention", Spelling("lora_transformer_"), HALF, only=r"blocks.*attn\.(to|add)_"),
    case("flux", "lora_transformer_", Spelling("lora_transformer_"), HALF, without="text"),
    case("flux", "lycoris_", Spelling("lycoris_"), HALF, without="text"),
    case("flux", "base_model.model.", Spelling("base_model.model.", True, "A", True), only=BLOCKS, without=FUSED_MLP),
    case("flux2", "kohya, all modules", Spelling("lora_unet_", True), EACH, MIXED),
    case("flux2", "diffusion_model.", COMFY, HALF, MIXED),
    case("flux2", "diffusion_model. with alpha", A_B, HALF),
    case("flux2", "diffusion_model.*.lora_down", DOWN, HALF),
    case("flux2", "transformer.*", TRANSFORMER, HALF, MIXED),
    case("flux2", "transformer.* with alpha", replace(TRANSFORMER, folded=False)),
    case("flux2", "names of diffusers", replace(COMFY, original=False, factors="dot"), HALF, only=BLOCKS),
    case("sd3", "kohya", Spelling("lora_unet_", True), HALF, only=BLOCKS),
    case("sd3", "diffusion_model. with alpha", A_B, HALF, only=BLOCKS),
    case("sd3", "transformer.* and text encoders", TRANSFORMER, HALF, MIXED),
    case("wan", "musubi", Spelling("lora_unet_", True), EACH, MIXED, only=BLOCKS),
    case("wan", "musubi without alpha", Spelling("lora_unet_", True), NONE, only=BLOCKS),
    case("wan", "musubi, one attention", Spelling("lora_unet_", True), HALF, only="attn1"),
    case("wan", "musubi, outside the blocks", Spelling("lora_unet_", True), HALF, only="proj_out"),
    case("wan", "diffusion_model. with alpha, blocks", A_B, EACH, MIXED, only=BLOCKS),
    case("wan", "diffusion_model. with alpha", A_B, HALF, without="patch_embedding"),
    case("wan", "diffusion_model.", COMFY, HALF, MIXED, without="patch_embedding"),
    case("wan", "diffusion_model. without blocks", COMFY, only="proj_out"),
    case("wan", "transformer.*", TRANSFORMER, HALF, MIXED),
    case("wan", "without prefix", BARE, HALF, only=BLOCKS),
    case("qwen_image", "flat", Spelling("lora_unet_"), EACH, MIXED),
    case("qwen_image", "without prefix, with alpha", replace(BARE, factors="down", folded=False), EACH),
    case("qwen_image", "without prefix or alpha", BARE, HALF),
    case("qwen_image", ".default", replace(BARE, factors="default"), HALF, MIXED),
    case("qwen_image", "transformer.* with alpha", replace(TRANSFORMER, folded=False), HALF),
    case("z_image", "flat, split", Spelling("lora_unet_"), EACH, MIXED),
    case("z_image", "flat, fused", Spelling("lora_unet_", True), HALF),
    case("z_image", "diffusion_model., fused", COMFY, HALF, only=BLOCKS),
    case("z_image", "diffusion_model., fused, with alpha", A_B, HALF, only=BLOCKS),
    case("z_image", "diffusion_model.*.lora_down, fused", DOWN, HALF, only=BLOCKS),
    case("z_image", "diffusion_model., split, with alpha", replace(A_B, original=False), EACH, MIXED),
    case("hunyuan_video", "diffusion_model.", COMFY, HALF, MIXED, without=f"{REFINER}|norm_out"),
    case(
        "hunyuan_video",
        "diffusion_model., last modulation",
        COMFY,
        only=r"^norm_out|attn\.(to_[qkv]|add)",
        without=REFINER,
    ),
    case("hunyuan_video", "diffusion_model. with alpha", A_B, HALF, without=REFINER),
    case("hunyuan_video", "flat", Spelling("lora_unet_", True), HALF, without=REFINER),
    case("hunyuan_video", "without attention", COMFY, only=r"^transformer_blocks.*\.ff\."),
    case("hunyuan_video", "transformer.*", TRANSFORMER, HALF, MIXED),
    case("ltx_video", "diffusion_model. in names of diffusers", replace(COMFY, original=False), HALF, MIXED),
    case("ltx_video", "diffusion_model.", COMFY, HALF),
    case("ltx_video", "diffusion_model. with alpha", A_B, HALF),
    case("ltx_video", "diffusion_model.*.lora_down", DOWN, NONE),
]


def measured(family: str, deltas: Mapping[str, Tensor], module: str) -> Tensor:
    """The change of a module, of all its parts where it stands for several."""
    table = family_named(family)
    assert table is not None
    parts = (table.parts(module) if not module.startswith("text_encoder") else None) or (module,)
    return torch.cat([deltas[part] for part in parts]).double()


def agrees(finding: Finding | None, found: Tensor, meant: Tensor, scale: float) -> bool:
    """Whether a finding, or that there is none, is what was measured. ``meant`` is at ``scale``."""
    limit = CLOSE * float(meant.norm())
    if finding is None:
        return float((found - meant).norm()) <= limit
    if finding.fault == "lost":
        return not bool(found.any())
    if finding.fault == "scaled":
        assert finding.meant == pytest.approx(scale) and finding.factor is not None
        return float((found - finding.factor * meant).norm()) <= limit * max(1.0, abs(finding.factor))
    return float((found - meant).norm()) > limit  # wrong


@pytest.mark.parametrize(("family", "spelling", "arguments", "options"), CASES)
def test_the_rules_say_what_diffusers_does(
    family: str, spelling: Spelling, arguments: tuple, options: dict, tmp_path: Path
) -> None:
    sample: Written = written(family, spelling, shapes(family), *arguments, **options)
    assert sample.tensors
    path = sample.save(tmp_path)
    _, facts = facts_of(path, family)
    reading = all_readers()["diffusers"].read(facts)
    outcome = loaded(family, path)
    assert (reading.refused or (None,))[0] == outcome.error, reading.refused
    if outcome.error is not None:
        return
    for stem, module in facts.modules.items():
        name = module.named.module
        factor = module.meant / (1.0 if spelling.folded else module.own_scale)  # of metadata
        meant = factor * sample.meant[name]
        finding = reading.findings.get(stem)
        found = measured(family, outcome.deltas, name)
        assert agrees(finding, found, meant, module.meant), (stem, finding)
    assert len(facts.modules) == len(sample.meant)
