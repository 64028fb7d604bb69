"""Tiny pipelines of diffusers with weights of zero: after a LoRA is fused into one, its weights *are* the change."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLIP = dict(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=12, projection_dim=20, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Outcome:
    """What the real loader made of a file: ``ΔW`` by module, text encoders with their names in front; or an error."""

    deltas: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None


def _clip(projected: bool = False) -> nn.Module:
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**CLIP))


def _unet(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=4, layers_per_block=2, norm_num_groups=4, attention_head_dim=4, **options
    )


def _sd15() -> Any:
    unet = _unet(
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=24,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=_clip(), tokenizer=None, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    unet = _unet(
        block_out_channels=(8, 16, 16),
        cross_attention_dim=44,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=44,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=_clip(), text_encoder_2=_clip(True), tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=16, axes_dims_rope=[4, 4, 4], guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=_flow(), vae=None, text_encoder=_clip(), tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=model,
    )  # fmt: skip


def _flux2() -> Any:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, timestep_guidance_channels=8, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    return diffusers.Flux2Pipeline(scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=model)


def _sd3() -> Any:
    model = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        caption_projection_dim=24, joint_attention_dim=20, pooled_projection_dim=40, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=_flow(), vae=None, text_encoder=_clip(True), tokenizer=None,
        text_encoder_2=_clip(True), tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _wan() -> Any:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=8, ffn_dim=40, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.UniPCMultistepScheduler(), transformer=model
    )


def _qwen_image() -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=20, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=model
    )


def _z_image() -> Any:
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=20, axes_dims=[4, 4, 4], axes_lens=[16, 16, 16],
    )  # fmt: skip
    return diffusers.ZImagePipeline(scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=model)


def _hunyuan_video() -> Any:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=20,
        pooled_projection_dim=16, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=model, vae=None, scheduler=_flow(), text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip


def _ltx_video() -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=2, caption_channels=20,
    )  # fmt: skip
    return diffusers.LTXPipeline(scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=model)


MAKERS = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "flux": _flux,
    "flux2": _flux2,
    "sd3": _sd3,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
    "hunyuan_video": _hunyuan_video,
    "ltx_video": _ltx_video,
}
"""By family."""


@functools.cache
def _made(family: str) -> Any:
    """Made once: that takes longer than to copy it."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        pipeline = MAKERS[family]()
    for model in models(pipeline).values():
        for parameter in model.parameters():
            parameter.detach().zero_()
    return pipeline


def pipeline(family: str) -> Any:
    """A pipeline of its own, whose weights are zero."""
    return copy.deepcopy(_made(family))


def models(pipe: Any) -> dict[str, nn.Module]:
    """The models that take a LoRA, by component; the denoiser is ``""``."""
    names = {"unet": "", "transformer": "", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    return {to: model for name, to in names.items() if (model := getattr(pipe, name, None)) is not None}


@functools.cache
def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights that can be adapted, by the names of modules that adapters have."""
    found = {}
    for component, model in models(_made(family)).items():
        for path, module in model.named_modules():
            if isinstance(module, WEIGHTED):
                found[canonical(component, path)] = tuple(module.weight.shape)
    return found


def canonical(component: str, path: str) -> str:
    """The name in an adapter of a module of a component."""
    if not component:
        return path
    inside = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
    return f"{component}.{inside}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the loaders log off the terminal."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def loaded(family: str, file: Path) -> Outcome:
    """What ``load_lora_weights`` and ``fuse_lora`` make of a file."""
    pipe = pipeline(family)
    with warnings.catch_warnings(), quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
            there = [c for c in pipe._lora_loadable_modules if getattr(pipe, c, None) is not None]
            pipe.fuse_lora(components=there)
        except Exception as error:  # what it is belongs to the outcome
            return Outcome(error=type(error).__name__)
    return Outcome(
        {
            canonical(component, path.removesuffix(".base_layer")): module.weight.detach().clone()
            for component, model in models(pipe).items()
            for path, module in model.named_modules()
            if isinstance(module, WEIGHTED) and not ({"lora_A", "lora_B"} & set(path.split(".")))
        }
    )
