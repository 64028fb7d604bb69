"""What is odd about a single file, and what ``inspect`` tells of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import shapes
from spelled_files import COMFY, HALF, KOHYA, MISSING, NONE, ORIGINAL, UNET, Alphas, Spelling, Written, written

import fastlora as fl
from fastlora.dialects.file_facts import FileFacts, facts_of
from fastlora.dialects.oddities import oddities
from fastlora.views.adapters import describe, show
from fastlora.views.single_files import file_data

PART = r"mid_block.*resnets\.0|text_encoder.*layers\.0\.mlp"
SAID = '{"unet.r": 3, "unet.lora_alpha": 6, "unet.target_modules": ["conv1"]}'


def facts(folder: Path, sample: Written, family: str = "sd15") -> FileFacts:
    return facts_of(sample.save(folder), family)[1]


def plain(spelling: Spelling = KOHYA, alphas: Alphas = HALF, *more: Any, **options: Any) -> Written:
    return written("sd15", spelling, shapes("sd15"), alphas, *more, **{"only": PART, **options})


def with_alpha(value: float) -> Written:
    sample = plain()
    sample.tensors["lora_unet_mid_block_resnets_0_conv1.alpha"] = torch.tensor(value)
    return sample


def with_more(tensors: dict[str, torch.Tensor]) -> Written:
    sample = plain()
    sample.tensors |= tensors
    return sample


def renamed(sample: Written) -> Written:
    sample.tensors = {k.replace("te1_text_model_", "te1_"): v for k, v in sample.tensors.items()}
    return sample


def in_8_bits(sample: Written) -> Written:
    factors = {k: v.to(torch.float8_e4m3fn) for k, v in sample.tensors.items() if not k.endswith("alpha")}
    sample.tensors |= factors
    return sample


def test_a_plain_file_is_not_odd(tmp_path: Path) -> None:
    assert oddities(facts(tmp_path, plain())) == []
    assert oddities(facts(tmp_path, written("sdxl", ORIGINAL, shapes("sdxl"), HALF), "sdxl")) == []
    assert oddities(facts(tmp_path, written("wan", COMFY, shapes("wan"), HALF), "wan")) == []


ODD: dict[str, Callable[[], Written]] = {
    "ranks differ, and neither alphas nor metadata": lambda: plain(KOHYA, NONE, (2, 4)),
    "modules have alpha beside lora_A": lambda: plain(replace(UNET, folded=False)),
    "conv1 has an alpha of 0": lambda: with_alpha(0.0),
    "conv1 has a negative alpha": lambda: with_alpha(-1.0),
    "metadata stand beside alphas": lambda: plain(only="conv1", metadata={"lora_adapter_metadata": SAID}),
    "lora_adapter_metadata alone, which only diffusers reads": lambda: plain(
        UNET, only="conv1", metadata={"lora_adapter_metadata": SAID}
    ),
    "the header says ss_network_alpha = 8, but alphas are 1.5": lambda: plain(metadata={"ss_network_alpha": "8"}),
    "names of the denoiser have several prefixes": lambda: with_more(plain(UNET, only="^conv_in").tensors),
    "some names are those of diffusers and some those of the original code": lambda: with_more(
        plain(ORIGINAL, only="^conv_in").tensors
    ),
    "no text_model in the name": lambda: renamed(plain()),
    "the name of an adapter inside": lambda: plain(replace(UNET, factors="default")),
    "factors of 8 bits": lambda: in_8_bits(plain()),
    "magnitudes (DoRA)": lambda: with_more({"lora_unet_mid_block_resnets_0_conv1.dora_scale": torch.ones(1, 16, 1, 1)}),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_is_told(what: str, tmp_path: Path) -> None:
    told = oddities(facts(tmp_path, ODD[what]()))
    assert any(what in sentence for sentence in told), told


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = written("sd15", KOHYA, shapes("sd15"), MISSING, (2, 4), only=f"{PART}|attentions.0.transformer")
    path = sample.save(tmp_path)
    adapter = fl.load(path, family="sd15")
    form = adapter.base.form
    assert form is not None
    data = describe(adapter) | {"file": file_data(facts_of(path, form.family)[1], form)}
    told = data["file"]
    assert (told["format"], told["family"]) == ("kohya", "sd15") and told["style"].startswith("kohya-diffusers")
    assert list(told["adapted"]) == ["denoiser", "text_encoder"]
    count = len(sample.meant)
    assert sum(part["modules"] for part in told["adapted"].values()) == count
    assert told["adapted"]["text_encoder"] == {
        "modules": 2, "kinds": {"feed-forward": 2}, "blocks": {"text_model.encoder.layers": [0]},
    }  # fmt: skip
    assert told["adapted"]["denoiser"]["blocks"]["down_blocks"] == [0, 1, 2]
    assert sum(told["alphas"].values()) + told["without_alpha"] == count == sum(told["ranks"].values())
    show(data, False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "file: kohya (kohya-diffusers), for Stable Diffusion 1 or 2 adapts denoiser:" in printed
    assert "down_blocks 0–2" in printed and f"alpha 3, none in {told['without_alpha']} modules; rank" in printed
