"""Mochi."""

from __future__ import annotations

from fastlora.dialects.encoders import T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours

_BLOCK, _THEIRS = "transformer_blocks.#", "blocks.#"
_NAMES = {
    # In the last block alone, diffusers calls it so; this comes before what holds for every block.
    "transformer_blocks.47.norm1_context.linear_1": "blocks.47.mod_y",
    **ours(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}}"),
    f"{_BLOCK}.attn1.{{to_qkv,to_added_qkv}}": f"{_THEIRS}.attn.{{qkv_x,qkv_y}}",
    f"{_BLOCK}.attn1.{{to_out.0,to_add_out}}": f"{_THEIRS}.attn.{{proj_x,proj_y}}",
    f"{_BLOCK}.attn1.{{norm_q,norm_k}}": f"{_THEIRS}.attn.{{q_norm_x,k_norm_x}}",
    f"{_BLOCK}.attn1.{{norm_added_q,norm_added_k}}": f"{_THEIRS}.attn.{{q_norm_y,k_norm_y}}",
    f"{_BLOCK}.{{norm1,norm1_context}}.linear": f"{_THEIRS}.{{mod_x,mod_y}}",
    f"{_BLOCK}.norm1_context.linear_1": "",
    f"{_BLOCK}.{{ff,ff_context}}.net.{{0.proj,2}}": f"{_THEIRS}.{{mlp_x,mlp_y}}.{{w1,w2}}",
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.timestep_embedder.{linear_1,linear_2}": "t_embedder.mlp.{0,2}",
    "time_embed.pooler.{to_kv,to_q,to_out}": "t5_y_embedder.{to_kv,to_q,to_out}",
    "time_embed.caption_proj": "t5_yproj",
    "norm_out.linear": "final_layer.mod",
    "proj_out": "final_layer.linear",
}

FAMILIES = (
    Family(
        name="mochi",
        title="Mochi",
        names=paired(_NAMES),
        fused=fused(f"{_BLOCK}.attn1", "to_qkv", "to_added_qkv"),
        # The original code gates with the first half of a layer, diffusers with the second.
        swapped={
            "norm_out.linear": True,
            **dict.fromkeys(expanded(f"{_BLOCK}.{{ff,ff_context}}.net.0.proj"), True),
        },
        text_encoders=dict.fromkeys(("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5),)),
        blocks={"transformer_blocks": 48},
        columns=dict.fromkeys(expanded(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_qkv,to_out.0}}"), (3072,)),
        hints=("mochi",),
        writing=(Writing("component", False), Writing("diffusion_model", True)),
    ),
)
