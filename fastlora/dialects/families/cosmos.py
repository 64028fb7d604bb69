"""Cosmos-Predict2, and Anima, which is built on it."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import Table, expanded, paired
from fastlora.dialects.projections import fused, ours, same

_BLOCK, _THEIRS = "transformer_blocks.#", "blocks.#"
_NAMES = {
    f"{_BLOCK}.{{attn1,attn2}}.{{to_q,to_k,to_v,to_out.0}}": (
        f"{_THEIRS}.{{self_attn,cross_attn}}.{{q_proj,k_proj,v_proj,output_proj}}"
    ),
    f"{_BLOCK}.{{attn1,attn2}}.{{norm_q,norm_k}}": f"{_THEIRS}.{{self_attn,cross_attn}}.{{q_norm,k_norm}}",
    f"{_BLOCK}.ff.net.{{0.proj,2}}": f"{_THEIRS}.mlp.{{layer1,layer2}}",
    f"{_BLOCK}.{{norm1,norm2,norm3}}.{{linear_1,linear_2}}": (
        f"{_THEIRS}.adaln_modulation_{{self_attn,cross_attn,mlp}}.{{1,2}}"
    ),
    **ours(f"{_BLOCK}.{{attn1.to_qkv,attn2.to_kv}}"),
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.{linear_1,linear_2}": "t_embedder.1.{linear_1,linear_2}",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.{linear_1,linear_2}": "final_layer.adaln_modulation.{1,2}",
    "proj_out": "final_layer.linear",
}
_CONDITIONER = same(
    "blocks.#.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}",
    "blocks.#.{norm_self_attn,norm_cross_attn,norm_mlp}",
    "blocks.#.mlp.{0,2}",
    "{embed,in_proj,out_proj,norm}",
)

FAMILIES = (
    Family(
        name="cosmos",
        title="Cosmos-Predict2",
        names=paired(_NAMES),
        fused={**fused(f"{_BLOCK}.attn1", "to_qkv"), **fused(f"{_BLOCK}.attn2", "to_kv")},
        text_encoders={
            **dict.fromkeys(("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5), ("text_encoder", LANGUAGE))),
            "text_conditioner": (("text_conditioner", Table(paired(_CONDITIONER))),),
        },
        blocks={"transformer_blocks": 36},
        columns=dict.fromkeys(expanded(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_out.0}}"), (2048, 5120)),
        hints=("cosmos", "anima"),
        aliases=("anima",),
        writing=(Writing("diffusion_model", True),),
    ),
)
