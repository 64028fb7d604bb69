"""Qwen-Image, whose original code has the names of diffusers."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours, same

_BLOCK = "transformer_blocks.#"
_NAMES = {
    **same(
        f"{_BLOCK}.attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out}}",
        f"{_BLOCK}.attn.{{norm_q,norm_k,norm_added_q,norm_added_k}}",
        f"{_BLOCK}.{{img_mod,txt_mod}}.1",
        f"{_BLOCK}.{{img_mlp,txt_mlp}}.net.{{0.proj,2}}",
        "time_text_embed.timestep_embedder.{linear_1,linear_2}",
        "{img_in,txt_in,txt_norm,norm_out.linear,proj_out}",
    ),
    **ours(f"{_BLOCK}.attn.{{to_qkv,to_added_qkv}}"),
}

FAMILIES = (
    Family(
        name="qwen_image",
        title="Qwen-Image",
        names=paired(_NAMES),
        fused=fused(f"{_BLOCK}.attn", "to_qkv", "to_added_qkv"),
        text_encoders=dict.fromkeys(("te", "te1", "qwen25_7b", "text_encoder"), (("text_encoder", LANGUAGE),)),
        blocks={"transformer_blocks": 60},
        columns=dict.fromkeys(
            expanded(f"{_BLOCK}.attn.{{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}}"), (3072,)
        ),
        hints=("qwenimage",),
        aliases=("qwen",),
        writing=(Writing("diffusion_model", False),),
    ),
)
