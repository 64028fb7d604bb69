"""Which family the names of a file belong to, and which modules they mean: a table."""

from __future__ import annotations

import pytest

from fastlora.dialects.detect import identify
from fastlora.dialects.families import families
from fastlora.dialects.patterns import ANY, filled
from fastlora.errors import InputError

TEXT = "text_model_encoder_layers_0_self_attn_q_proj"

# Names without their prefix and the shapes of their weights, and the families they may be of: those that rows, columns,
# numbers of blocks or other names do not tell apart.
FLAT = {
    "SD1.5 by what reads the text": ("down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k 640x768", "sd15"),
    "SD2 by what reads the text": ("down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k 640x1024", "sd15"),
    "SDXL by what reads the text": ("input_blocks_4_1_transformer_blocks_0_attn2_to_v 640x2048", "sdxl"),
    "the refiner by what reads the text": ("input_blocks_4_1_transformer_blocks_0_attn2_to_k 768x1280", "sdxl_refiner"),
    "SD1.5 by a level": ("down_blocks_3_resnets_0_conv1 1280x11520, up_blocks_3_attentions_0_proj_in 320x320", "sd15"),
    "SD1.5 by its original levels": ("input_blocks_1_1_proj_in 320x320", "sd15"),
    "SDXL by its depth": ("middle_block_1_transformer_blocks_9_attn1_to_q 1280x1280", "sdxl"),
    "SDXL by an upsampler": ("output_blocks_2_2_conv 1280x11520", "sdxl"),
    "a level that SD1.5 and SDXL have": (
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q 640x640", "sd15 sdxl",
    ),
    "a convolution that all UNets have": ("conv_in 320x36", "sd15 sdxl sdxl_refiner"),
    "SD3": ("joint_blocks_3_x_block_attn_qkv 4608x1536", "sd3"),
    "HunyuanVideo by a layer": ("double_blocks_3_img_mlp_fc1 12288x3072", "hunyuan_video"),
    "HunyuanVideo by a modulation": ("double_blocks_3_img_mod_linear 18432x3072", "hunyuan_video"),
    "HunyuanVideo by its refiner": (
        "txt_in_individual_token_refiner_blocks_0_self_attn_qkv 9216x3072", "hunyuan_video",
    ),
    "HunyuanVideo by a block": ("double_blocks_19_img_attn_qkv 9216x3072", "hunyuan_video"),
    "HunyuanVideo by a single block": ("single_blocks_38_linear1 21504x3072", "hunyuan_video"),
    "Flux by a layer": ("double_blocks_3_img_mlp_0 12288x3072", "flux"),
    "Flux by a modulation": ("double_blocks_3_img_mod_lin 18432x3072", "flux"),
    "Flux or HunyuanVideo": ("single_blocks_3_linear1 21504x3072", "flux hunyuan_video"),
    "Flux or HunyuanVideo by what they add": ("single_blocks_3_linear2 3072x15360", "flux hunyuan_video"),
    "Flux.2 by its rows": ("single_blocks_3_linear1 27648x3072", "flux2"),
    "Flux.2 by a layer": ("double_blocks_3_img_mlp_0 18432x3072", "flux2"),
    "Flux.2 by a modulation": ("single_stream_modulation_lin 9216x3072", "flux2"),
    "Flux.2 by its width": ("double_blocks_3_img_attn_qkv 18432x6144", "flux2"),
    "Flux.2 in diffusers": ("single_transformer_blocks_3_attn_to_qkv_mlp_proj 27648x3072", "flux2"),
    "Flux.1 of one size": ("single_transformer_blocks_3_attn_to_qkv_mlp_proj 21504x3072", "flux hunyuan_video"),
    "Qwen-Image by a layer": ("transformer_blocks_0_img_mlp_net_0_proj 12288x3072", "qwen_image"),
    "Qwen-Image by a modulation": ("transformer_blocks_0_txt_mod_1 18432x3072", "qwen_image"),
    "Qwen-Image by a block": ("transformer_blocks_20_attn_add_q_proj 3072x3072", "qwen_image"),
    "Flux, HunyuanVideo or Qwen-Image": (
        "transformer_blocks_3_attn_add_q_proj 3072x3072", "flux flux2 hunyuan_video qwen_image",
    ),
    "SD3 by its width": ("transformer_blocks_3_attn_add_q_proj 1536x1536", "sd3"),
    "Wan": ("blocks_3_self_attn_q 5120x5120, blocks_3_ffn_2 5120x13824", "wan"),
    "Wan in diffusers": ("blocks_3_attn1_to_q 1536x1536", "wan"),
    "Wan of pictures": ("blocks_3_cross_attn_k_img 5120x5120", "wan"),
    "Cosmos": ("blocks_3_self_attn_q_proj 2048x2048", "cosmos"),
    "Anima": ("blocks_3_mlp_layer1 8192x2048", "cosmos"),
    "Z-Image": ("layers_3_attention_to_q 3840x3840", "z_image"),
    "Ideogram 4 by its width": ("layers_3_attention_to_q 4608x4608", "ideogram4"),
    "HunyuanImage by its width": ("transformer_blocks_3_attn_to_q 3584x3584", "hunyuan_image"),
    "Krea 2": ("transformer_blocks_3_attn_to_gate 6144x6144", "krea2"),
    "Mochi": ("transformer_blocks_3_attn1_add_q_proj 3072x1536", "mochi"),
    "Z-Image, fused": ("layers_3_attention_qkv 11520x3840", "z_image"),
    "Lumina 2": ("layers_3_attention_qkv 3840x2304", "lumina2"),
    "Lumina 2 by its width": ("layers_3_feed_forward_w1 9216x2304", "lumina2"),
    "HiDream": ("double_stream_blocks_3_block_attn1_to_q_t 2560x2560", "hidream"),
    "LTX-2": ("transformer_blocks_3_audio_attn1_to_q 2048x2048", "ltx_video"),
    "LTX-Video by its width": ("transformer_blocks_3_attn1_to_q 4096x4096", "ltx_video"),
    "LTX-Video or Cosmos": ("transformer_blocks_3_attn1_to_q 2048x2048", "cosmos ltx_video"),
    "PixArt or Sana": ("transformer_blocks_3_attn1_to_q 1152x1152", "pixart sana"),
    "PixArt by a layer": (
        "transformer_blocks_3_attn1_to_q 1152x1152, transformer_blocks_3_ff_net_2 1152x4608", "pixart",
    ),
    "Sana by its width": ("transformer_blocks_3_attn1_to_q 2240x2240", "sana"),
    "CogVideoX by its width": ("transformer_blocks_3_attn1_to_q 1920x1920", "cogvideox"),
    "AuraFlow": ("joint_transformer_blocks_3_attn_to_q 3072x3072", "auraflow"),
    "AuraFlow, original": ("single_layers_3_attn_w1q 3072x3072", "auraflow"),
}  # fmt: skip


def shaped(text: str) -> dict[str, tuple[int, int]]:
    """``name ROWSxCOLUMNS, …``."""
    pairs = (item.split() for item in text.split(", "))
    return {name: (int(shape.partition("x")[0]), int(shape.partition("x")[2])) for name, shape in pairs}


@pytest.mark.parametrize("case", FLAT)
def test_flat_names_tell_the_family(case: str) -> None:
    shapes, expected = shaped(FLAT[case][0]), tuple(FLAT[case][1].split())
    for prefix in ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"):
        found = identify({prefix + name: shape for name, shape in shapes.items()})
        assert tuple(sorted(found.candidates)) == expected and found.unmatched == ()
        assert found.family == (expected[0] if len(expected) == 1 else None)
        # Families between which nothing tells have one meaning for the names: it is given, and needs no note.
        assert found.notes == () and len(found.modules) == len(shapes)
        known = [families()[name].from_flat(text, shape) for name in expected for text, shape in shapes.items()]
        assert {n.module for n in known if n} == {n.module for n in found.modules.values()}


def whole_file(family: str, prefix: str, original: bool) -> dict[str, tuple[int, int] | None]:
    """Names of all modules of a family, dotted, as in block 2."""
    names = families()[family].names
    spelled = [(theirs if original else ours) for ours, theirs in names.items()]
    return {prefix + filled(text, ["2"] * text.count(ANY)): None for text in spelled if text}


@pytest.mark.parametrize("family", families())
def test_whole_files_are_of_one_family(family: str) -> None:
    for prefix in ("transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "", "base_model.model."):
        for original in (False, True):
            stems = whole_file(family, prefix, original)
            found = identify(stems)
            flat = identify({f"lora_unet_{stem.removeprefix(prefix).replace('.', '_')}": None for stem in stems})
            if stems:
                assert found.family == flat.family == family, (prefix, original, found.candidates)
                assert [n.module for n in found.modules.values()] == [n.module for n in flat.modules.values()]
                assert found.notes == flat.notes == () and found.unmatched == ()


def test_every_block_of_a_model_is_its_family() -> None:
    """Files of attention alone, which several families have: by how many blocks there are."""
    for family, doubles, singles in (("flux", 19, 38), ("hunyuan_video", 20, 40)):
        stems = {f"lora_unet_double_blocks_{i}_img_attn_qkv": (9216, 3072) for i in range(doubles)}
        stems |= {f"lora_unet_single_blocks_{i}_linear1": (21504, 3072) for i in range(singles)}
        assert identify(stems).family == family
        assert identify(dict(list(stems.items())[:-2])).family in (None, family)
    some = {f"lora_unet_double_blocks_{i}_img_attn_qkv": (9216, 3072) for i in range(5, 12)}
    assert identify(some).family is None


TEXT_ENCODERS = {
    "SD1.5": ("sd15", {"lora_te_": "text_encoder"}),
    "SDXL": ("sdxl", {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}),
    "SDXL, ComfyUI": (
        "sdxl",
        {"text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_g.transformer.": "text_encoder_2"},
    ),
    "SD3": ("sd3", {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}),
    "Flux": ("flux", {"lora_te1_": "text_encoder", "text_encoder.": "text_encoder"}),
    "HunyuanVideo": ("hunyuan_video", {"lora_te2_": "text_encoder_2"}),
}


@pytest.mark.parametrize("case", TEXT_ENCODERS)
def test_text_encoders_are_components_of_the_family(case: str) -> None:
    family, prefixes = TEXT_ENCODERS[case]
    names = list(whole_file(family, "lora_unet_", True))[:60]
    stems: dict[str, tuple[int, int] | None] = {name.replace(".", "_"): None for name in names}
    expected = []
    for prefix, component in prefixes.items():
        stems[prefix + (TEXT if prefix.endswith("_") else "text_model.encoder.layers.0.self_attn.q_proj")] = (768, 768)
        expected.append(f"{component}.text_model.encoder.layers.0.self_attn.q_proj")
    found = identify(stems)
    assert found.family == family
    assert [n.module for n in found.modules.values()][-len(expected) :] == expected


T5 = "encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize(
    ("family", "stem", "module"),
    [
        ("flux", f"lora_te3_{T5}", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
        ("flux", f"lora_te2_{T5}", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
        ("sd3", f"lora_te3_{T5}", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"),
        (
            "sd3",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0",
            "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0",
        ),
        ("hunyuan_video", "lora_te1_layers_0_self_attn_q_proj", "text_encoder.layers.0.self_attn.q_proj"),
        (
            "qwen_image",
            "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.gate_proj",
            "text_encoder.model.layers.0.mlp.gate_proj",
        ),
        ("cosmos", "diffusion_model.llm_adapter.blocks.0.mlp.0", "text_conditioner.blocks.0.mlp.0"),
        ("cosmos", "text_conditioner.blocks.0.self_attn.o_proj", "text_conditioner.blocks.0.self_attn.o_proj"),
        ("wan", "transformer_2.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"),
        (
            "sd15",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "sd15",
            "text_encoder.encoder.layers.0.mlp.fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        (
            "sd15",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        ),
        ("flux", "double_blocks.7.processor.proj_lora2", "transformer_blocks.7.attn.to_add_out"),
        ("flux", "single_blocks.7.processor.qkv_lora", "single_transformer_blocks.7.attn.to_qkv"),
        (
            "flux",
            "transformer.base_model.model.double_blocks.0.txt_attn.qkv",
            "transformer_blocks.0.attn.to_added_qkv",
        ),
        ("flux", "base_model.model.transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ],
)
def test_names_in_a_family_that_is_said(family: str, stem: str, module: str) -> None:
    found = identify({stem: (64, 64)}, family=family)
    assert (found.family, [n.module for n in found.modules.values()], found.unmatched) == (family, [module], ())


def test_text_encoders_alone_need_no_family() -> None:
    found = identify({f"lora_te1_{TEXT}": (768, 768), f"lora_te2_{TEXT}": (1280, 1280)})
    assert found.family is None and "sdxl" in found.candidates and found.notes == ()
    assert [n.component for n in found.modules.values()] == ["text_encoder", "text_encoder_2"]


def test_names_that_families_use_for_different_modules_are_kept() -> None:
    stems = {f"lora_te3_{T5}": (4096, 4096), "text_encoders.t5xxl.transformer.encoder.final_layer_norm": None}
    found = identify(stems)
    assert found.family is None and set(found.candidates) >= {"flux", "sd3"} and found.unmatched == ()
    assert [n.module for n in found.modules.values()] == [f"lora_te3_{T5}", "t5xxl.encoder.final_layer_norm"]
    assert len(found.notes) == 1 and "--family" in found.notes[0] and "kept as the file has them" in found.notes[0]
    assert identify(stems, family="sd3").modules[f"lora_te3_{T5}"].component == "text_encoder_3"


METADATA = {
    "sd_v1": "sd15",
    "sd_v2_768_v": "sd15",
    "sd_1.5": "sd15",
    "sdxl_base_v1-0": "sdxl",
    "sdxl_1.0": "sdxl",
    "sd3": "sd3",
    "flux1": "flux",
    "chroma": "flux",
    "lumina2": "lumina2",
    "stable-diffusion-v1/lora": "sd15",
    "stable-diffusion-xl-v1-base/lora": "sdxl",
    "stable-diffusion-xl-v1-refiner/lora": "sdxl_refiner",
    "stable-diffusion-3-medium/lora": "sd3",
    "flux-1-dev/lora": "flux",
    "Flux.1-dev/lora": "flux",
    "flux.2": "flux2",
    "hunyuan-video/lora": "hunyuan_video",
    "wan2.1": "wan",
    "qwen-image": "qwen_image",
}


@pytest.mark.parametrize("text", METADATA)
def test_metadata_decide_between_families_that_fit(text: str) -> None:
    family = METADATA[text]
    stems = (
        "diffusion_model.proj_out",
        "unet.conv_out",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.model.layers.0.mlp.up_proj",
        "text_encoder.shared",
        "text_encoder_2.text_model.final_layer_norm",
    )
    fitting = [stem for stem in stems if len(found := identify({stem: None}).candidates) > 1 and family in found]
    assert fitting
    for stem in fitting:
        for key in ("modelspec.architecture", "ss_base_model_version"):
            found = identify({stem: None}, {key: text})
            assert (found.family, found.candidates, found.notes) == (family, (family,), ())


def test_metadata_that_contradict_the_names_are_told() -> None:
    stems = {"lora_unet_double_blocks_3_img_mod_lin": (18432, 3072)}
    found = identify(stems, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert found.family == "flux" and len(found.notes) == 1
    assert "ss_base_model_version = 'sdxl_base_v1-0'" in found.notes[0] and "Flux" in found.notes[0]
    assert identify(stems, {"ss_base_model_version": "something new"}).notes == ()


def test_metadata_that_contradict_the_sizes_are_told() -> None:
    """The names are those of both, the width is not that of the family that the metadata name."""
    stems = {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 768)}
    found = identify(stems, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    assert found.family == "sd15" and "name Stable Diffusion XL" in found.notes[0]


def test_widths_that_no_model_has_are_no_reason() -> None:
    """A model of another size under names that several families have."""
    stems = {"transformer.transformer_blocks.0.attn.add_q_proj": (80, 80)}
    assert set(identify(stems).candidates) >= {"flux", "flux2", "hunyuan_video", "qwen_image", "sd3"}
    rows = {"lora_unet_layers_0_attention_qkv": (96, 32)}
    assert identify(rows).candidates == ("ideogram4", "z_image")
    assert identify({**rows, "lora_unet_layers_0_attention_out": (32, 32)}).family == "z_image"
    assert identify({**rows, "lora_unet_layers_0_attention_o": (32, 32)}).family == "ideogram4"
    assert identify({"lora_unet_layers_0_attention_qkv": (40, 24)}).family == "lumina2"


@pytest.mark.parametrize(("width", "family"), [(3840, "z_image"), (4608, "ideogram4")])
def test_the_width_tells_ideogram_from_z_image(width: int, family: str) -> None:
    assert identify({"diffusion_model.layers.0.attention.qkv": (3 * width, width)}).family == family


@pytest.mark.parametrize(
    ("stem", "shape", "family", "module"),
    [
        ("diffusion_model.blocks.3.attn.wq", (6144, 6144), "krea2", "transformer_blocks.3.attn.to_q"),
        ("base_model.model.txtfusion.refiner_blocks.0.mlp.up", (64, 32), "krea2", "text_fusion.refiner_blocks.0.ff.up"),
        ("diffusion_model.blocks.3.attn.qkv_x", (9216, 3072), "mochi", "transformer_blocks.3.attn1.to_qkv"),
        ("blocks.47.mod_y", (6144, 3072), "mochi", "transformer_blocks.47.norm1_context.linear_1"),
        ("blocks.46.mod_y", (6144, 3072), "mochi", "transformer_blocks.46.norm1_context.linear"),
    ],
)
def test_original_names_of_newer_families(stem: str, shape: tuple[int, int], family: str, module: str) -> None:
    found = identify({stem: shape})
    assert found.family == family and found.modules[stem].module == module


FLUX = "lora_unet_double_blocks_0_img_mod_lin"
# Stems of a file that its family has, and those that no family has.
REFUSED = {
    "nothing is known": ("", "lora_unet_foo_bar"),
    "without a prefix, one of another model": ("conv_in", "stages.0.q"),
    "one of another model": ("lora_unet_conv_in", "lora_unet_blocks_of_another_model"),
    "of two families": (f"{FLUX} lora_unet_double_blocks_1_img_mod_lin", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
    "a name cut short": (FLUX, "lora_unet_double_blocks_0_img_attn_qk"),
    "an underscore too many": ("", f"{FLUX}_"),
    "a number written otherwise": ("", "lora_unet_double_blocks_00_img_mod_lin"),
    "a text encoder that the family has not": (FLUX, "lora_te3_text_model_encoder_layers_0_mlp_fc1"),
    "a prior": ("", "lora_prior_unet_down_blocks_0_0 lora_prior_te_text_model_final_layer_norm"),
    "a prefix alone": ("", "lora_unet_"),
    "a prefix and a dot": ("", "transformer."),
    "a text encoder alone, damaged": (f"lora_te1_{TEXT}", f"lora_te1_{TEXT}x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_of_no_family_are_told(case: str) -> None:
    known, unknown = (text.split() for text in REFUSED[case])
    found = identify(dict.fromkeys((*known, *unknown), (8, 8)))
    assert found.family is None and found.unmatched == tuple(unknown) and list(found.modules) == known


def test_a_family_that_is_said_must_have_the_names() -> None:
    found = identify({"lora_unet_conv_in": (320, 36)}, family="flux")
    assert found.unmatched == ("lora_unet_conv_in",)


def test_a_family_may_be_said_by_another_name() -> None:
    assert identify({"lora_unet_conv_in": (320, 36)}, family="sd2").family == "sd15"


def test_names_are_kept_where_the_family_is_another() -> None:
    stems = {"lora_unet_foo_bar": None, "transformer.stages.0.q": None, "text_encoder.stages.0.q": None}
    found = identify(stems, family="other")
    assert [n.module for n in found.modules.values()] == ["lora_unet_foo_bar", "stages.0.q", "text_encoder.stages.0.q"]
    assert found.family is None and found.unmatched == () and "kept as the file has them" in found.notes[0]


def test_a_language_model_keeps_its_names() -> None:
    for prefix in ("", "base_model.model."):
        found = identify({f"{prefix}model.layers.0.self_attn.q_proj": (8, 8), f"{prefix}lm_head": (9, 8)})
        assert found.unmatched == () and found.family is None and found.notes == ()
        assert [n.module for n in found.modules.values()] == ["model.layers.0.self_attn.q_proj", "lm_head"]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match=r"no family 'sd9'; families are .*flux.*'other' keeps names"):
        identify({"lora_unet_conv_in": (320, 36)}, family="sd9")


def test_a_file_without_modules_has_no_family() -> None:
    assert identify({}).family is None and identify({}).modules == {}
