"""Which family the names of a file belong to, and which modules they mean."""

from __future__ import annotations

import pytest

from fastlora.dialects.detect import identify
from fastlora.errors import InputError

TEXT = "text_model_encoder_layers_0_self_attn_q_proj"


def test_kohya_names_of_sdxl_are_modules_of_diffusers() -> None:
    found = identify(
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (640, 2048),
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (10240, 1280),
            "lora_unet_output_blocks_2_2_conv": (1280, 11520),
            f"lora_te1_{TEXT}": (768, 768),
            f"lora_te2_{TEXT}": (1280, 1280),
        }
    )
    assert (found.family, found.unmatched, found.notes) == ("sdxl", (), ())
    assert [named.module for named in found.modules.values()] == [
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "up_blocks.0.upsamplers.0.conv",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ]


def test_fused_projections_of_flux_stay_fused() -> None:
    found = identify(
        {
            "lora_unet_double_blocks_3_img_attn_qkv": (9216, 3072),
            "lora_unet_single_blocks_7_linear1": (21504, 3072),
            "lora_unet_double_blocks_3_img_mod_lin": (18432, 3072),
            "lora_unet_final_layer_adaLN_modulation_1": (6144, 3072),
        }
    )
    assert found.family == "flux"
    assert [(n.module, n.swapped) for n in found.modules.values()] == [
        ("transformer_blocks.3.attn.to_qkv", False),
        ("single_transformer_blocks.7.attn.to_qkv_mlp_proj", False),
        ("transformer_blocks.3.norm1.linear", False),
        ("norm_out.linear", True),
    ]


def test_names_of_no_family_are_told() -> None:
    found = identify({"lora_unet_conv_in": (320, 36), "lora_unet_blocks_of_another_model": (8, 8)})
    assert found.family is None and found.unmatched == ("lora_unet_blocks_of_another_model",)


def test_a_language_model_keeps_its_names() -> None:
    found = identify({"base_model.model.model.layers.0.self_attn.q_proj": (8, 8)})
    assert found.unmatched == () and found.family is None
    assert [n.module for n in found.modules.values()] == ["model.layers.0.self_attn.q_proj"]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match=r"no family 'sd9'; families are .*flux"):
        identify({"lora_unet_conv_in": (320, 36)}, family="sd9")
