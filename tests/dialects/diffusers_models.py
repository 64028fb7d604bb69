"""The modules of real models, by path, with the shapes of their weights: diffusers' own classes, without memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping

import diffusers
import torch
from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

Build = Callable[[], nn.Module]


def unet(**more: object) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**more)


def sdxl() -> nn.Module:
    return unet(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True,
        attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def refiner() -> nn.Module:
    return unet(
        block_out_channels=(384, 768, 1536, 1536), cross_attention_dim=1280, use_linear_projection=True,
        attention_head_dim=(6, 12, 24, 24), transformer_layers_per_block=4, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128,
        num_attention_heads=20, caption_channels=[4096, 4096], text_emb_dim=2048, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(64, 32, 32), max_resolution=(128, 128), llama_layers=(0, 1),
    )  # fmt: skip


BUILDS: Mapping[str, tuple[str, Build]] = {
    "sd15": ("sd15", lambda: unet(cross_attention_dim=768)),
    "sd2": ("sd15", lambda: unet(cross_attention_dim=1024, use_linear_projection=True)),
    "sdxl": ("sdxl", sdxl),
    "refiner": ("sdxl_refiner", refiner),
    "flux": ("flux", lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True)),
    "chroma": ("flux", lambda: diffusers.ChromaTransformer2DModel(num_layers=2, num_single_layers=2)),
    "flux2": ("flux2", lambda: diffusers.Flux2Transformer2DModel(num_layers=2, num_single_layers=2)),
    "sd3": (
        "sd3",
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=4, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        ),
    ),
    "wan": ("wan", lambda: diffusers.WanTransformer3DModel(num_layers=2, image_dim=1280, added_kv_proj_dim=5120)),
    "wan_vace": ("wan", lambda: diffusers.WanVACETransformer3DModel(num_layers=3, vace_layers=[0, 2])),
    "hunyuan_video": ("hunyuan_video", lambda: diffusers.HunyuanVideoTransformer3DModel(guidance_embeds=True)),
    "framepack": (
        "hunyuan_video",
        lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            num_layers=2, num_single_layers=2, has_image_proj=True, has_clean_x_embedder=True
        ),
    ),
    "qwen_image": ("qwen_image", lambda: diffusers.QwenImageTransformer2DModel(num_layers=20)),
    "z_image": ("z_image", lambda: diffusers.ZImageTransformer2DModel(n_layers=2)),
    "lumina2": (
        "lumina2",
        lambda: diffusers.Lumina2Transformer2DModel(
            hidden_size=2304, num_layers=2, num_attention_heads=24, num_kv_heads=8
        ),
    ),
    "hidream": ("hidream", hidream),
    "ltx_video": ("ltx_video", lambda: diffusers.LTXVideoTransformer3DModel(num_layers=2)),
    "ltx2": (
        "ltx_video",
        lambda: diffusers.LTX2VideoTransformer3DModel(
            num_layers=2, gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True
        ),
    ),
    "cosmos": (
        "cosmos",
        lambda: diffusers.CosmosTransformer3DModel(
            num_attention_heads=16, num_layers=2, extra_pos_embed_type=None, concat_padding_mask=True
        ),
    ),
    "pixart": ("pixart", lambda: diffusers.PixArtTransformer2DModel(num_layers=2, use_additional_conditions=True)),
    "auraflow": (
        "auraflow",
        lambda: diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=2),
    ),
    "sana": ("sana", lambda: diffusers.SanaTransformer2DModel(num_layers=2, qk_norm="rms_norm_across_heads")),
    "sana_sprint": ("sana", lambda: diffusers.SanaTransformer2DModel(num_layers=2, guidance_embeds=True)),
    "cogvideox": ("cogvideox", lambda: diffusers.CogVideoXTransformer3DModel(num_layers=2, ofs_embed_dim=4)),
    "mochi": ("mochi", lambda: diffusers.MochiTransformer3DModel(num_layers=2)),
    "mochi48": ("mochi", lambda: diffusers.MochiTransformer3DModel(num_layers=48)),
    "cogview4": ("cogview4", lambda: diffusers.CogView4Transformer2DModel(num_layers=2)),
    "hunyuan_video15": (
        "hunyuan_video15",
        lambda: diffusers.HunyuanVideo15Transformer3DModel(num_layers=2, num_refiner_layers=2),
    ),
    "hunyuan_image": (
        "hunyuan_image", lambda: diffusers.HunyuanImageTransformer2DModel(num_layers=2, num_single_layers=2)
    ),
    "kandinsky5": (
        "kandinsky5", lambda: diffusers.Kandinsky5Transformer3DModel(num_text_blocks=2, num_visual_blocks=2)
    ),
    "ideogram4": ("ideogram4", lambda: diffusers.Ideogram4Transformer2DModel(num_layers=2)),
    "krea2": ("krea2", lambda: diffusers.Krea2Transformer2DModel(num_layers=2)),
}  # fmt: skip
"""Models by name: their family, and how to build one of published width."""

CLIP = CLIPTextConfig(num_hidden_layers=2, projection_dim=64)
ENCODERS: Mapping[str, Build] = {
    "clip": lambda: CLIPTextModelWithProjection(CLIP),
    "t5": lambda: T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu", vocab_size=32)),
    "conditioner": lambda: AnimaTextConditioner(model_dim=512),
}


@functools.cache
def modules(name: str) -> Mapping[str, tuple[int, ...]]:
    """The modules of a model that have a weight, with its shape."""
    return weighted(BUILDS[name][1])


def weighted(build: Build) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers calls a class of its own by a deprecated name
        model = build()
    weights = ((path, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {path: tuple(weight.shape) for path, weight in weights if isinstance(weight, torch.Tensor)}
