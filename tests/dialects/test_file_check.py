"""``fl.check``: what it answers, what it advises, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import shapes
from safetensors.torch import save_file
from spelled_files import COMFY, HALF, KOHYA, ONE, ORIGINAL, RANK, TRANSFORMER, UNET, Spelling, written

import fastlora as fl

PART = r"attentions\.0\.transformer_blocks\.0|resnets\.1\.conv|text_encoder"
DEFAULT = ["diffusers", "comfy", "a1111"]


def file(folder: Path, family: str, spelling: Spelling, *arguments: object, **options: object) -> Path:
    options.setdefault("only", PART)
    return written(family, spelling, shapes(family), *arguments, **options).save(folder)  # type: ignore[arg-type]


def test_a_file_that_all_read_alike_is_clean(tmp_path: Path) -> None:
    found = fl.check(file(tmp_path, "sd15", KOHYA, ONE, (2, 4)), family="sd15")
    assert found.is_clean and found.advice is None and len(repr(found)) < 200
    assert list(found.readings) == DEFAULT and found.facts.family == "sd15"


def test_factors_are_told_by_module(tmp_path: Path) -> None:
    path = file(tmp_path, "sd15", KOHYA, RANK, (2, 4), without="text_encoder")
    found = fl.check(path, "diffusers", family="sd15")
    findings = found.readings["diffusers"].findings
    ranks = {stem: found.facts.modules[stem].rank for stem in findings}
    common = {round(f.factor * ranks[stem]) for stem, f in findings.items() if f.factor is not None}
    assert not found.is_clean and findings and len(common) == 1  # one alpha for all of attention
    assert all("attn" in stem for stem in findings)
    assert (
        found.advice == f"`fastlora convert {path} --to kohya --out FILE.safetensors` writes it as readers agree on it"
    )


@pytest.mark.parametrize(
    ("family", "spelling", "options", "target"),
    [
        ("sdxl", UNET, {}, "kohya"),
        ("flux", ORIGINAL, {"only": "^norm_out"}, "diffusers"),
        ("flux", Spelling("lycoris_"), {"only": r"\.norm"}, "kohya"),
        ("sd3", Spelling("lora_unet_", True), {"only": r"\.norm"}, "diffusers"),
        ("wan", TRANSFORMER, {"only": "attn1"}, "comfy"),
    ],
)
def test_the_advice_is_the_dialect_in_which_readers_agree(
    family: str, spelling: Spelling, options: dict, target: str, tmp_path: Path
) -> None:
    found = fl.check(file(tmp_path, family, spelling, HALF, **options), family=family)
    assert f"--to {target} " in str(found.advice)


def test_programs_without_the_model_count_only_where_they_are_named(tmp_path: Path) -> None:
    path = file(tmp_path, "wan", COMFY, only="attn1")
    assert fl.check(path, family="wan").is_clean
    asked = fl.check(path, ["comfy", "a1111"], family="wan")
    assert not asked.is_clean and asked.readings["a1111"].has_no_model and asked.is_right("comfy")
    assert asked.advice == "use it with another program"


def test_dora_has_no_way_out_by_names(tmp_path: Path) -> None:
    sample = written("sd15", KOHYA, shapes("sd15"), only="mid_block.*conv1")
    stem = "lora_unet_mid_block_resnets_0_conv1"
    sample.tensors[f"{stem}.dora_scale"] = torch.ones(16, 1, 1, 1)
    found = fl.check(sample.save(tmp_path), family="sd15")
    assert found.readings["diffusers"].findings[stem].fault == "wrong" and "DoRA" in str(found.advice)


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "qwen_image", replace(TRANSFORMER, text={}), only=r"attn\.add_q")
    with pytest.raises(fl.InputError, match=r"its names fit .* or qwen_image.*--family"):
        fl.check(path)
    assert fl.check(path, family="qwen_image").is_clean
    with pytest.raises(fl.InputError, match="there is no family 'sd7'"):
        fl.check(path, family="sd7")
    with pytest.raises(fl.InputError, match="no rules for a reader 'comfyui'; known are diffusers, comfy"):
        fl.check(path, ["comfyui"])
    with pytest.raises(fl.InputError, match="no reader is named"):
        fl.check(path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(fl.InputError, match="is a folder and not a single file"):
        fl.check(tmp_path / "empty")
    with pytest.raises(fl.InputError, match="there is no file or directory"):
        fl.check(tmp_path / "nothing.safetensors")
    sample = written("sd15", KOHYA, shapes("sd15"), only="mid_block.*conv1")
    sample.tensors["lora_unet_mid_block_resnets_0_conv1.alpha"] = torch.tensor(float("nan"))
    with pytest.raises(fl.InputError, match=r"conv1\.alpha' is no number"):
        fl.check(sample.save(tmp_path), family="sd15")


def test_no_factor_is_read(tmp_path: Path) -> None:
    """A file of which only the header, the alphas and no numbers of factors are sound."""
    path = file(tmp_path, "sd15", KOHYA, ONE)
    clean = fl.check(path, family="sd15")
    sample = written("sd15", KOHYA, shapes("sd15"), ONE, only=PART)
    spoilt = {k: v if k.endswith("alpha") else torch.full_like(v, float("nan")) for k, v in sample.tensors.items()}
    save_file(spoilt, path)
    assert fl.check(path, family="sd15") == clean


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": (), "lora_up.weight": (4, 2)},
        {"lora_down.weight": (0, 4), "lora_up.weight": (4, 0)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": ()},
        {"hada_w1_a": (2, 2), "hada_w1_b": (), "hada_w2_a": (2, 2), "hada_w2_b": (2, 2)},
    ],
)
def test_factors_that_are_none_break_nothing(parts: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{stem}.{name}": torch.ones(shape) for name, shape in parts.items()}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "damaged.safetensors")
    with pytest.raises(fl.InputError, match=stem):
        fl.load(tmp_path / "damaged.safetensors", family="sd15")
    if "lora_up.weight" in parts:
        with pytest.raises(fl.InputError, match=rf"{stem}' has A .*; needed are \[rank, in\]"):
            fl.check(tmp_path / "damaged.safetensors", family="sd15")
    else:
        assert fl.check(tmp_path / "damaged.safetensors", family="sd15").facts.modules[stem].meant == 1.0
