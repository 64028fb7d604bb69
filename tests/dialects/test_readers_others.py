"""Facts about readers that no test can run: ComfyUI, which was run once, and sd-scripts and A1111."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import shapes
from spelled_files import (
    COMFY,
    EACH,
    HALF,
    KOHYA,
    MISSING,
    NONE,
    ORIGINAL,
    TRANSFORMER,
    UNET,
    Spelling,
    written,
)

from fastlora.dialects.file_facts import FileFacts, facts_of
from fastlora.dialects.readers import all_readers
from fastlora.dialects.verdicts import Reading

READ, REFUSED = "", "refused"
SD = r"attentions\.0\.transformer_blocks\.0|resnets\.1|samplers|conv_in|conv_out|time_emb|add_emb|text_encoder"
BLOCKS = r"blocks\.|layers\."
MIXED = (2, 4)
A_B = replace(COMFY, folded=False)
FLAT = Spelling("lora_unet_")
FLAT_ORIGINAL = Spelling("lora_unet_", True)


def facts(tmp_path: Path, family: str, spelling: Spelling, *arguments: object, **options: object) -> FileFacts:
    sample = written(family, spelling, shapes(family), *arguments, **options)  # type: ignore[arg-type]
    return facts_of(sample.save(tmp_path), family)[1]


def lost(file: FileFacts, reading: Reading) -> set[str]:
    assert all(finding.fault == "lost" for finding in reading.findings.values())
    return {file.modules[stem].named.module for stem in reading.findings}


# family, spelling, modules in the file, what ComfyUI loses ("": nothing, as a pattern of modules)
COMFY_LOSES = [
    ("sd15", KOHYA, SD, READ),
    ("sd15", ORIGINAL, SD, READ),
    ("sd15", UNET, SD, r"attn\d\.to_"),
    ("sd15", replace(UNET, factors="dot"), SD, r"attn\d\.to_"),
    ("sd15", replace(UNET, factors="processor"), r"attn1\.to_", READ),
    ("sd15", COMFY, SD, READ),
    ("sd15", replace(COMFY, original=False), r"resnets", r"."),
    ("sdxl", ORIGINAL, SD, READ),
    ("sdxl", KOHYA, SD, READ),
    ("sdxl", UNET, SD, r"attn\d\.to_|text_projection"),
    ("sdxl", Spelling("lycoris_"), SD, READ),
    ("flux", ORIGINAL, "", READ),
    ("flux", FLAT, BLOCKS, r"."),
    ("flux", A_B, "", READ),
    ("flux", TRANSFORMER, "", READ),
    ("flux", Spelling("lora_transformer_"), "", READ),
    ("flux", Spelling("lycoris_"), "", READ),
    ("flux", Spelling("base_model.model.", True, "A", True), BLOCKS, r"."),
    ("flux2", FLAT_ORIGINAL, "", READ),
    ("flux2", A_B, "", READ),
    ("flux2", TRANSFORMER, "", r"time_guidance_embed|stream_modulation"),
    ("sd3", FLAT_ORIGINAL, BLOCKS, READ),
    ("sd3", TRANSFORMER, "", r"text_projection"),
    ("sd3", Spelling("lora_transformer_"), BLOCKS, READ),
    ("wan", FLAT_ORIGINAL, BLOCKS, READ),
    ("wan", COMFY, "", READ),
    ("wan", TRANSFORMER, "", r"."),
    ("wan", replace(TRANSFORMER, prefix=""), "", r"."),
    ("qwen_image", FLAT, "", READ),
    ("qwen_image", replace(TRANSFORMER, prefix=""), "", READ),
    ("qwen_image", replace(TRANSFORMER, prefix="", factors="default"), "", READ),
    ("qwen_image", TRANSFORMER, "", READ),
    ("z_image", FLAT, BLOCKS, r"attention\.to_"),
    ("z_image", FLAT_ORIGINAL, BLOCKS, READ),
    ("z_image", COMFY, BLOCKS, READ),
    ("z_image", replace(COMFY, original=False), "", READ),
    ("z_image", TRANSFORMER, "", READ),
    ("hunyuan_video", COMFY, BLOCKS, READ),
    ("hunyuan_video", replace(COMFY, prefix="transformer."), BLOCKS, READ),
    ("hunyuan_video", FLAT_ORIGINAL, BLOCKS, r"\.ff|norm\d?(_context)?\.linear"),
    ("hunyuan_video", TRANSFORMER, BLOCKS, r"."),
    ("ltx_video", COMFY, "", READ),
    ("ltx_video", TRANSFORMER, "", r"."),
]


@pytest.mark.parametrize(("family", "spelling", "only", "gone"), COMFY_LOSES, ids=lambda v: getattr(v, "prefix", None))
def test_comfyui_loses_what_it_has_no_name_for(
    family: str, spelling: Spelling, only: str, gone: str, tmp_path: Path
) -> None:
    file = facts(tmp_path, family, spelling, EACH, MIXED, only=only)
    found = lost(file, all_readers()["comfy"].read(file))
    there = {module.named.module for module in file.modules.values()}
    assert there and found == {m for m in there if gone and re.search(gone, m)}


def test_comfyui_scales_by_alpha_and_reads_no_metadata(tmp_path: Path) -> None:
    comfy = all_readers()["comfy"]
    for alphas in (EACH, MISSING, NONE):
        assert not comfy.read(facts(tmp_path, "sd15", KOHYA, alphas, MIXED, only=SD)).findings
    said = '{"unet.r": 3, "unet.lora_alpha": 6, "unet.target_modules": ["conv1"]}'
    file = facts(tmp_path, "sd15", UNET, only=r"conv1", metadata={"lora_adapter_metadata": said})
    found = comfy.read(file).findings
    assert found.keys() == file.modules.keys()
    assert {(f.fault, f.meant, f.found, f.factor) for f in found.values()} == {("scaled", 2.0, 1.0, 0.5)}


def altered(tmp_path: Path, family: str, spelling: Spelling, change: dict[str, torch.Tensor | None]) -> FileFacts:
    """A file with other tensors: ``None`` takes one away."""
    sample = written(family, spelling, shapes(family), only=r"mid_block.*resnets\.0\.(conv1|time_emb_proj)")
    for key, tensor in change.items():
        if tensor is None:
            del sample.tensors[key]
        else:
            sample.tensors[key] = tensor
    return facts_of(sample.save(tmp_path), family)[1]


STEM = "lora_unet_mid_block_resnets_0_conv1"


def test_damage_and_additions(tmp_path: Path) -> None:
    readers = all_readers()
    up_alone = altered(tmp_path, "sd15", KOHYA, {f"{STEM}.lora_down.weight": None})
    assert readers["comfy"].read(up_alone).refused == ("KeyError", f"the lora_down of '{STEM}' is not there")
    assert (readers["diffusers"].read(up_alone).refused or ("",))[0] == "ValueError"
    down_alone = altered(tmp_path, "sd15", KOHYA, {f"{STEM}.lora_up.weight": None})
    assert {s: f.fault for s, f in readers["comfy"].read(down_alone).findings.items()} == {STEM: "lost"}
    assert (readers["diffusers"].read(down_alone).refused or ("",))[0] == "KeyError"
    bias = altered(tmp_path, "sd15", KOHYA, {f"{STEM}.diff_b": torch.ones(16)})
    assert not readers["comfy"].read(bias).findings
    assert (readers["diffusers"].read(bias).refused or ("",))[0] == "ValueError"
    zero = altered(tmp_path, "sd15", KOHYA, {f"{STEM}.alpha": torch.tensor(0.0)})
    assert not readers["comfy"].read(zero).findings and not readers["a1111"].read(zero).findings
    scripts = readers["sd-scripts"].read(zero).findings
    assert {s: (f.meant, f.found, f.factor) for s, f in scripts.items()} == {STEM: (0.0, 1.0, None)}


def test_comfyui_takes_the_last_of_two_names(tmp_path: Path) -> None:
    one = written("flux", FLAT_ORIGINAL, shapes("flux"), HALF, only=r"\.norm|attn\.to_[qkv]", without="single")
    two = written("flux", TRANSFORMER, shapes("flux"), HALF, only=r"blocks\.0\.norm1|blocks\.0\.attn\.to_q")
    one.tensors |= two.tensors
    file = facts_of(one.save(tmp_path), "flux")[1]
    found = {stem: f.fault for stem, f in all_readers()["comfy"].read(file).findings.items()}
    assert found == {
        "lora_unet_double_blocks_0_img_mod_lin": "lost",
        "lora_unet_double_blocks_0_txt_mod_lin": "lost",
        "lora_unet_double_blocks_0_img_attn_qkv": "wrong",
    }
    diffusers = {s: f.fault for s, f in all_readers()["diffusers"].read(file).findings.items()}
    assert diffusers == {stem: "lost" for stem in file.modules if stem.startswith("lora_unet_")}


def test_diffusers_cannot_multiply_8_bits(tmp_path: Path) -> None:
    for family, spelling, refuses in (("flux", FLAT_ORIGINAL, True), ("sd15", KOHYA, False), ("wan", COMFY, False)):
        sample = written(family, spelling, shapes(family), only=r"conv1$|attn1|\.norm\d?\.linear", without="single")
        sample.tensors = {k: v if k.endswith("alpha") else v.to(torch.float8_e4m3fn) for k, v in sample.tensors.items()}
        refused = all_readers()["diffusers"].read(facts_of(sample.save(tmp_path), family)[1]).refused
        assert (refused is not None and refused[0] == "NotImplementedError") == refuses


@pytest.mark.parametrize(("shape", "right"), [((16, 1, 1, 1), ()), ((1, 16, 1, 1), ("comfy", "a1111"))])
def test_dora_is_applied_by_few(shape: tuple[int, ...], right: tuple[str, ...], tmp_path: Path) -> None:
    file = altered(tmp_path, "sd15", KOHYA, {f"{STEM}.dora_scale": torch.ones(shape)})
    for name, reader in all_readers().items():
        found = {s: f.fault for s, f in reader.read(file).findings.items()}
        assert found == ({} if name in right else {STEM: "wrong"}), name


def test_flux_with_a_negative_alpha_never_ends_in_diffusers(tmp_path: Path) -> None:
    file = facts(tmp_path, "flux", FLAT_ORIGINAL, lambda i, rank: -1.0, only=r"\.norm\d")
    assert (all_readers()["diffusers"].read(file).refused or ("",))[0] == "no answer"
    assert not all_readers()["comfy"].read(file).findings


@pytest.mark.parametrize(
    ("family", "spelling", "gone"),
    [
        ("sd15", KOHYA, r"conv_in|conv_out|time_embedding"),
        ("sd15", ORIGINAL, r"^(?!text)"),
        ("sdxl", ORIGINAL, r"conv_in|conv_out|time_embedding|add_embedding|text_projection"),
        ("sdxl", UNET, r"."),
        ("flux", ORIGINAL, r"^norm_out|^proj_out"),
    ],
)
def test_sd_scripts_take_what_they_train(family: str, spelling: Spelling, gone: str, tmp_path: Path) -> None:
    file = facts(tmp_path, family, spelling, HALF)
    found = lost(file, all_readers()["sd-scripts"].read(file))
    assert found == {m.named.module for m in file.modules.values() if re.search(gone, m.named.module)}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_sd_scripts_need_the_alphas_of_flux_and_later_models(family: str, tmp_path: Path) -> None:
    file = facts(tmp_path, family, FLAT_ORIGINAL, MISSING, only=BLOCKS)
    assert (all_readers()["sd-scripts"].read(file).refused or ("",))[0] == "KeyError"
    assert all_readers()["sd-scripts"].read(facts(tmp_path, "wan", COMFY)).has_no_model


def test_a1111_takes_names_of_kohyas_scripts(tmp_path: Path) -> None:
    a1111 = all_readers()["a1111"]
    for family, spelling, gone in (("sd15", KOHYA, "^$"), ("sdxl", ORIGINAL, "^$"), ("sdxl", KOHYA, "add_embedding")):
        file = facts(tmp_path, family, spelling, EACH, MIXED, only=SD)
        assert lost(file, a1111.read(file)) == {
            m.named.module for m in file.modules.values() if re.search(gone, m.named.module)
        }
    file = facts(tmp_path, "sd15", UNET, only=SD)
    assert lost(file, a1111.read(file)) == {m.named.module for m in file.modules.values()}
    assert a1111.read(facts(tmp_path, "flux", ORIGINAL)).has_no_model
