"""Flux.2, whose single blocks have one projection for everything, in diffusers too."""

from __future__ import annotations

from fractions import Fraction

from fastlora.dialects.encoders import LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours

_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_EMBEDDERS = {"timestep": "time_in", "guidance": "guidance_in"}
_STREAMS = "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}"
_NAMES = {
    **ours(f"{_DOUBLE}.attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}}"),
    f"{_DOUBLE}.attn.{{to_qkv,to_added_qkv}}": "double_blocks.#.{img_attn,txt_attn}.qkv",
    f"{_DOUBLE}.attn.{{to_out.0,to_add_out}}": "double_blocks.#.{img_attn,txt_attn}.proj",
    f"{_DOUBLE}.attn.{{norm_q,norm_k}}": "double_blocks.#.img_attn.norm.{query_norm,key_norm}",
    f"{_DOUBLE}.attn.{{norm_added_q,norm_added_k}}": "double_blocks.#.txt_attn.norm.{query_norm,key_norm}",
    f"{_DOUBLE}.{{ff,ff_context}}.{{linear_in,linear_out}}": "double_blocks.#.{img_mlp,txt_mlp}.{0,2}",
    f"{_SINGLE}.attn.{{to_qkv_mlp_proj,to_out}}": "single_blocks.#.{linear1,linear2}",
    f"{_SINGLE}.attn.{{norm_q,norm_k}}": "single_blocks.#.norm.{query_norm,key_norm}",
    "{x_embedder,context_embedder}": "{img_in,txt_in}",
    **{
        f"time_guidance_embed.{here}_embedder.{{linear_1,linear_2}}": f"{there}.{{in_layer,out_layer}}"
        for here, there in _EMBEDDERS.items()
    },
    f"{_STREAMS}.linear": f"{_STREAMS}.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}

FAMILIES = (
    Family(
        name="flux2",
        title="Flux.2",
        names=paired(_NAMES),
        fused=fused(f"{_DOUBLE}.attn", "to_qkv", "to_added_qkv"),
        swapped={"norm_out.linear": True},
        text_encoders=dict.fromkeys(("te", "te1", "text_encoder"), (("text_encoder", LANGUAGE),)),
        blocks={"transformer_blocks": 8, "single_transformer_blocks": 48},
        columns=dict.fromkeys(
            (
                *expanded(f"{_DOUBLE}.attn.{{to_q,to_k,to_v,to_qkv,add_q_proj,add_k_proj,add_v_proj,to_added_qkv}}"),
                f"{_SINGLE}.attn.to_qkv_mlp_proj",
            ),
            (6144, 4096, 3072),  # dev; klein 9B, 4B
        ),
        ratios={
            f"{_SINGLE}.attn.to_qkv_mlp_proj": 9,
            f"{_SINGLE}.attn.to_out": Fraction(1, 4),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.linear_in"), 6),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.linear_out"), Fraction(1, 3)),
        },
        hints=("flux2",),
        aliases=("klein",),
        writing=(Writing("diffusion_model", True), Writing("component", False)),
    ),
)
