"""What a tensor is to its module, by the end of its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastlora.dialects.suffixes import Split, group, plain_stem, split
from fastlora.errors import InputError, UnsupportedAdapter

FILE = Path("style.safetensors")
ONE = torch.ones(2, 2)

NAMES = {
    "lora_unet_mid_block_proj.lora_down.weight": Split("lora_unet_mid_block_proj", "down", "down"),
    "lora_unet_mid_block_proj.alpha": Split("lora_unet_mid_block_proj", "alpha"),
    "x.conv.lora_mid.weight": Split("x.conv", "mid"),
    "unet.q.lora_A.weight": Split("unet.q", "down", "A"),
    "blocks.0.q.lora_B.default.weight": Split("blocks.0.q", "up", "", "default"),
    "blocks.0.q.lora_A.my-style.weight": Split("blocks.0.q", "down", "A", "my-style"),
    "blocks.0.q.lora_B": Split("blocks.0.q", "up"),
    "blocks.0.q.lora_B.bias": Split("blocks.0.q", "up_bias"),
    "unet.q.lora.up.weight": Split("unet.q", "up"),
    "unet.q.lora.down.weight": Split("unet.q", "down", "lora-dot"),
    "text_encoder.q_proj.lora_linear_layer.down.weight": Split("text_encoder.q_proj", "down", "lora-linear-layer"),
    "unet.a.attn1.processor.to_q_lora.down.weight": Split("unet.a.attn1.processor.to_q", "down", "processor"),
    "double_blocks.3.processor.qkv_lora2.up.weight": Split("double_blocks.3.processor.qkv_lora2", "up", "xlabs"),
    "x.hada_w1_b": Split("x", "hada_w1_b"),
    "x.lokr_t2": Split("x", "lokr_t2"),
    "x.w_norm": Split("x", "diff"),
    "x.b_norm": Split("x", "diff_b"),
    "double_blocks.0.img_attn.norm.key_norm.scale": Split("double_blocks.0.img_attn.norm.key_norm", "set_weight"),
    "x.scale": Split("x", "scale"),
    "x.lora_magnitude_vector.weight": Split("x", "magnitude"),
    "x.lora_magnitude_vector.default.weight": Split("x", "magnitude", "", "default"),
    "x.magnitude": Split("x", "magnitude"),
    "x.dora_scale": Split("x", "dora_scale"),
    "x.weight": None,
    "alpha": None,
    "x.lora_C.weight": None,
    ".alpha": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_suffix_counts(name: str) -> None:
    assert split(name) == NAMES[name]


LAYER = "text_encoder.text_model.encoder.layers.0.self_attn"
OLD = {
    "unet.a.attn1.processor.to_q": "unet.a.attn1.to_q",
    "unet.a.attn1.processor.to_out": "unet.a.attn1.to_out.0",
    f"{LAYER}.to_out": f"{LAYER}.out_proj",
}


@pytest.mark.parametrize("old", OLD)
def test_old_spellings(old: str) -> None:
    assert plain_stem(old) == OLD[old]


def test_tensors_are_grouped_by_module_and_not_copied() -> None:
    tensors = {"a.lora_down.weight": torch.ones(1, 2), "a.lora_up.weight": ONE, "b.diff_b": ONE[0], "a.alpha": ONE[0]}
    found = group(tensors, FILE)
    assert list(found.modules) == ["a", "b"] and found.spelling == "down" and found.notes == ()
    assert found.modules["a"].parts["up"] is ONE and found.modules["a"].keys["up"] == "a.lora_up.weight"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.oft_blocks", "OFT"),
        ("x.boft_blocks", "OFT"),
        ("x.a1.weight", "GLoRA"),
        ("x.on_input", "(IA)³"),
        ("x.lambda_layer", "T-LoRA"),
        ("x.diff_m", "diff_m"),
        ("x.reshape_weight", "control LoRA"),
    ],
)
def test_what_is_no_additive_change_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"tensor 'x\.") as told:
        group({"x.unknown": ONE, name: ONE}, FILE)
    assert words in str(told.value) and str(FILE) in str(told.value)


def test_unknown_suffixes_are_listed() -> None:
    tensors = {"a.lora_down.weight": ONE, **{f"{n}.weird": ONE for n in "bcdefg"}}
    with pytest.raises(UnsupportedAdapter, match=r"'b\.weird', 'c\.weird', 'd\.weird', 'e\.weird' and 2 more"):
        group(tensors, FILE)


def test_a_part_that_is_there_twice() -> None:
    names = ("a.lora_A.weight", "a.lora_down.weight")
    found = group({names[0]: ONE, names[1]: ONE.clone(), "a.lora_B.weight": ONE}, FILE)
    assert found.notes and "1 tensors are there twice" in found.notes[0] and found.modules["a"].parts["down"] is ONE
    with pytest.raises(InputError, match="the same part of one module and differ"):
        group({names[0]: ONE, names[1]: ONE * 2}, FILE)


def test_two_adapters_in_one_file() -> None:
    with pytest.raises(InputError, match=r"holds 2 adapters \(one, two\)"):
        group({"a.lora_A.one.weight": ONE, "b.lora_A.two.weight": ONE}, FILE)


def test_bundled_embeddings_are_told() -> None:
    found = group({"a.lora_A.weight": ONE, "bundle_emb.cat.string_to_param.*": ONE}, FILE)
    assert list(found.modules) == ["a"] and "left out: bundle_emb.cat" in found.notes[0]
