"""What ``check`` finds, ``convert`` mends: the file that the advice makes is read as meant by all who are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import loaded, shapes
from spelled_files import COMFY, EACH, HALF, KOHYA, NONE, ORIGINAL, RANK, TRANSFORMER, UNET, Spelling, written

import fastlora as fl
from fastlora.dialects.check import best_format

MIXED = (2, 4, 8)
SD = r"attentions\.0\.transformer_blocks\.0|resnets\.1|samplers|conv_in|conv_out|time_emb|add_emb|text_enc.*layers"
BLOCKS = r"blocks\.|layers\."
NO_MLP = r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"
A_B = replace(COMFY, folded=False)
FLAT = Spelling("lora_unet_")
FLAT_ORIGINAL = Spelling("lora_unet_", True)
CLOSE = 1e-5
"""Relative to the norm: scales go into float32 factors, and diffusers multiplies in float32."""


def case(family: str, name: str, spelling: Spelling, *arguments: object, **options: object) -> object:
    return pytest.param(family, spelling, arguments, options, id=f"{family}: {name}")


CASES = [
    case("sd15", "alpha is the rank", KOHYA, RANK, MIXED, only=SD),
    case("sd15", "alphas differ", KOHYA, EACH, only=SD),
    case("sd15", "original names", ORIGINAL, EACH, only=SD),
    case("sd15", "unet.", UNET, HALF, MIXED, only=SD),
    case("sdxl", "alphas differ", ORIGINAL, EACH, MIXED, only=SD),
    case("sdxl", "names of diffusers", KOHYA, HALF, only=SD),
    case("sdxl", "unet.", UNET, HALF, only=SD),
    case("flux", "all modules", replace(ORIGINAL, text={}), EACH, without=NO_MLP),
    case("flux", "diffusion_model. with alpha", A_B, HALF, only=BLOCKS, without=NO_MLP),
    case("flux", "lycoris_", Spelling("lycoris_"), EACH, MIXED, only=BLOCKS, without="text|single"),
    case("flux2", "all modules", FLAT_ORIGINAL, HALF, only=BLOCKS),
    case("flux2", "diffusion_model. with alpha", A_B, EACH, MIXED, only=BLOCKS),
    case("flux2", "transformer. with alpha", replace(TRANSFORMER, folded=False), HALF, only=BLOCKS),
    case("sd3", "kohya", FLAT_ORIGINAL, EACH, MIXED, only=BLOCKS),
    case("wan", "no alpha", FLAT_ORIGINAL, NONE, MIXED, only=BLOCKS),
    case("wan", "one attention", FLAT_ORIGINAL, HALF, only="attn1"),
    case("wan", "transformer.", TRANSFORMER, HALF, MIXED, only=BLOCKS),
    case("qwen_image", "transformer. with alpha", replace(TRANSFORMER, folded=False), EACH, MIXED, only=BLOCKS),
    case("z_image", "flat, split", FLAT, EACH, MIXED, only=BLOCKS),
    case("z_image", "fused, with alpha", A_B, HALF, only=BLOCKS),
    case("hunyuan_video", "flat", FLAT_ORIGINAL, HALF, only=BLOCKS, without=rf"{NO_MLP}|refiner"),
    case("hunyuan_video", "diffusion_model. with alpha", A_B, EACH, only=BLOCKS, without=rf"{NO_MLP}|refiner"),
    case("ltx_video", "transformer.", TRANSFORMER, HALF, MIXED, only=BLOCKS),
]


@pytest.mark.parametrize(("family", "spelling", "arguments", "options"), CASES)
def test_the_way_out_is_one(family: str, spelling: Spelling, arguments: tuple, options: dict, tmp_path: Path) -> None:
    sample = written(family, spelling, shapes(family), *arguments, **options)
    path = sample.save(tmp_path)
    before = fl.check(path, family=family)
    target = best_format(before.facts)
    assert target is not None and (before.is_clean or f"--to {target} " in str(before.advice))
    made = fl.convert(path, tmp_path / "mended.safetensors", target, family=family)
    after = fl.check(made, family=family)
    assert after.is_clean, {name: reading for name, reading in after.readings.items() if not after.is_right(name)}
    outcome = loaded(family, made)
    assert outcome.error is None
    parts = {m.named.module: m.parts or (m.named.module,) for m in before.facts.modules.values()}
    for module, meant in sample.meant.items():
        found = torch.cat([outcome.deltas[part] for part in parts[module]]).double()
        assert float((found - meant).norm()) <= CLOSE * float(meant.norm()), module
