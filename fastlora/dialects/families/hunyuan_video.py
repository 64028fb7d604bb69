"""HunyuanVideo, and FramePack, which has its names in diffusers and two modules more."""

from __future__ import annotations

from fractions import Fraction

from fastlora.dialects.encoders import CLIP, LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, fused_with_mlp, ours, same

_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_REFINER, _THEIRS = "context_embedder.token_refiner.refiner_blocks.#", "txt_in.individual_token_refiner.blocks.#"
_NAMES = {
    **ours(f"{_DOUBLE}.attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}}"),
    f"{_DOUBLE}.attn.{{to_qkv,to_added_qkv}}": "double_blocks.#.{img,txt}_attn_qkv",
    f"{_DOUBLE}.attn.{{to_out.0,to_add_out}}": "double_blocks.#.{img,txt}_attn_proj",
    f"{_DOUBLE}.attn.{{norm_q,norm_k}}": "double_blocks.#.{img_attn_q_norm,img_attn_k_norm}",
    f"{_DOUBLE}.attn.{{norm_added_q,norm_added_k}}": "double_blocks.#.{txt_attn_q_norm,txt_attn_k_norm}",
    f"{_DOUBLE}.{{norm1,norm1_context}}.linear": "double_blocks.#.{img,txt}_mod.linear",
    f"{_DOUBLE}.{{ff,ff_context}}.net.{{0.proj,2}}": "double_blocks.#.{img,txt}_mlp.{fc1,fc2}",
    **ours(f"{_SINGLE}.attn.{{to_q,to_k,to_v,to_qkv}}", f"{_SINGLE}.proj_mlp"),
    f"{_SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.#.linear1",
    f"{_SINGLE}.proj_out": "single_blocks.#.linear2",
    f"{_SINGLE}.attn.{{norm_q,norm_k}}": "single_blocks.#.{q_norm,k_norm}",
    f"{_SINGLE}.norm.linear": "single_blocks.#.modulation.linear",
    **ours(f"{_REFINER}.attn.{{to_q,to_k,to_v}}"),
    f"{_REFINER}.attn.{{to_qkv,to_out.0}}": f"{_THEIRS}.{{self_attn_qkv,self_attn_proj}}",
    f"{_REFINER}.{{norm1,norm2,norm_out.linear}}": f"{_THEIRS}.{{norm1,norm2,adaLN_modulation.1}}",
    f"{_REFINER}.ff.net.{{0.proj,2}}": f"{_THEIRS}.mlp.{{fc1,fc2}}",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.{linear_1,linear_2}": "txt_in.t_embedder.mlp.{0,2}",
    "context_embedder.time_text_embed.text_embedder.{linear_1,linear_2}": "txt_in.c_embedder.{linear_1,linear_2}",
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.{timestep,guidance}_embedder.{linear_1,linear_2}": "{time_in,guidance_in}.mlp.{0,2}",
    "time_text_embed.text_embedder.{linear_1,linear_2}": "vector_in.{in_layer,out_layer}",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    **same("clean_x_embedder.{proj,proj_2x,proj_4x}", "image_projection.{up,down}"),
}
_READS_HIDDEN = (
    f"{_DOUBLE}.attn.{{to_q,to_k,to_v,to_qkv,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}}",
    f"{_SINGLE}.attn.{{to_q,to_k,to_v,to_qkv_mlp_proj}}",
)

FAMILIES = (
    Family(
        name="hunyuan_video",
        title="HunyuanVideo",
        names=paired(_NAMES),
        fused={
            **fused(f"{_DOUBLE}.attn", "to_qkv", "to_added_qkv"),
            **fused_with_mlp(_SINGLE),
            **fused(f"{_SINGLE}.attn", "to_qkv"),
            **fused(f"{_REFINER}.attn", "to_qkv"),
        },
        swapped={"norm_out.linear": True},
        text_encoders={
            **dict.fromkeys(("te", "te1", "llama", "text_encoder"), (("text_encoder", LANGUAGE),)),
            **dict.fromkeys(("te2", "clip_l", "text_encoder_2"), (("text_encoder_2", CLIP),)),
        },
        blocks={"transformer_blocks": 20, "single_transformer_blocks": 40},
        columns={name: (3072,) for pattern in _READS_HIDDEN for name in expanded(pattern)},
        ratios={
            f"{_SINGLE}.attn.to_qkv_mlp_proj": 7,
            f"{_SINGLE}.proj_out": Fraction(1, 5),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.net.0.proj"), 4),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.net.2"), Fraction(1, 4)),
        },
        hints=("hunyuanvideo",),
        aliases=("framepack",),
        writing=(Writing("diffusion_model", True), Writing("component", False)),
    ),
)
