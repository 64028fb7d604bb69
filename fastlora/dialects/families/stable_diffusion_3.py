"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from fastlora.dialects.encoders import CLIP, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours

_BLOCK, _THEIRS = "transformer_blocks.#", "joint_blocks.#"
_NAMES = {
    **ours(f"{_BLOCK}.attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}}", f"{_BLOCK}.attn2.{{to_q,to_k,to_v}}"),
    f"{_BLOCK}.{{attn.to_qkv,attn.to_added_qkv}}": f"{_THEIRS}.{{x_block,context_block}}.attn.qkv",
    f"{_BLOCK}.attn.{{to_out.0,to_add_out}}": f"{_THEIRS}.{{x_block,context_block}}.attn.proj",
    f"{_BLOCK}.attn.{{norm_q,norm_k}}": f"{_THEIRS}.x_block.attn.{{ln_q,ln_k}}",
    f"{_BLOCK}.attn.{{norm_added_q,norm_added_k}}": f"{_THEIRS}.context_block.attn.{{ln_q,ln_k}}",
    f"{_BLOCK}.attn2.{{to_qkv,to_out.0,norm_q,norm_k}}": f"{_THEIRS}.x_block.attn2.{{qkv,proj,ln_q,ln_k}}",
    f"{_BLOCK}.{{norm1,norm1_context}}.linear": f"{_THEIRS}.{{x_block,context_block}}.adaLN_modulation.1",
    f"{_BLOCK}.{{ff,ff_context}}.net.{{0.proj,2}}": f"{_THEIRS}.{{x_block,context_block}}.mlp.{{fc1,fc2}}",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.{timestep_embedder,text_embedder}.{linear_1,linear_2}": "{t_embedder,y_embedder}.mlp.{0,2}",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}

FAMILIES = (
    Family(
        name="sd3",
        title="Stable Diffusion 3",
        names=paired(_NAMES),
        fused={**fused(f"{_BLOCK}.attn", "to_qkv", "to_added_qkv"), **fused(f"{_BLOCK}.attn2", "to_qkv")},
        # The last block only scales and shifts its context: two halves, the other way round in diffusers.
        swapped={"norm_out.linear": True, f"{_BLOCK}.norm1_context.linear": False},
        text_encoders={
            **dict.fromkeys(("te", "te1", "clip_l", "text_encoder"), (("text_encoder", CLIP),)),
            **dict.fromkeys(("te2", "clip_g", "text_encoder_2"), (("text_encoder_2", CLIP),)),
            **dict.fromkeys(("te3", "t5xxl", "text_encoder_3"), (("text_encoder_3", T5),)),
        },
        blocks={"transformer_blocks": 38},
        columns=dict.fromkeys(
            expanded(f"{_BLOCK}.attn.{{to_q,to_k,to_v,to_qkv,add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_out.0}}"),
            (1536, 2432),
        ),
        ratios=dict.fromkeys(expanded(f"{_BLOCK}.{{ff,ff_context}}.net.0.proj"), 4),
        hints=("stablediffusionv3", "stablediffusion3", "sd3"),
        aliases=("sd35",),
        writing=(Writing("component", False),),
    ),
)
