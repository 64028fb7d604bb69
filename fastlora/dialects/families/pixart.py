"""PixArt-α and -Σ, and Sana, which have one layout."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours

_BLOCK = "transformer_blocks.#"
_COMMON = {
    **ours(f"{_BLOCK}.attn1.{{to_q,to_k,to_v}}", f"{_BLOCK}.attn2.{{to_k,to_v}}"),
    f"{_BLOCK}.attn1.{{to_qkv,to_out.0}}": "blocks.#.attn.{qkv,proj}",
    f"{_BLOCK}.attn2.{{to_q,to_kv,to_out.0}}": "blocks.#.cross_attn.{q_linear,kv_linear,proj}",
    "caption_projection.{linear_1,linear_2}": "y_embedder.y_proj.{fc1,fc2}",
    "proj_out": "final_layer.linear",
}
_EMBEDDERS = {"timestep": "t_embedder", "resolution": "csize_embedder", "aspect_ratio": "ar_embedder"}
_PIXART = {
    **_COMMON,
    f"{_BLOCK}.ff.net.{{0.proj,2}}": "blocks.#.mlp.{fc1,fc2}",
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.linear": "t_block.1",
    **{
        f"adaln_single.emb.{here}_embedder.{{linear_1,linear_2}}": f"{there}.mlp.{{0,2}}"
        for here, there in _EMBEDDERS.items()
    },
}
_SANA = {
    **_COMMON,
    **ours(f"{_BLOCK}.{{attn1,attn2}}.{{norm_q,norm_k}}"),
    f"{_BLOCK}.ff.{{conv_inverted,conv_depth,conv_point}}": "blocks.#.mlp.{inverted_conv,depth_conv,point_conv}.conv",
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.linear": "t_block.1",
    "time_embed.emb.timestep_embedder.{linear_1,linear_2}": "t_embedder.mlp.{0,2}",
    **ours("time_embed.{timestep_embedder,guidance_embedder}.{linear_1,linear_2}"),
    "caption_norm": "attention_y_norm",
}
_FUSED = {**fused(f"{_BLOCK}.attn1", "to_qkv"), **fused(f"{_BLOCK}.attn2", "to_kv")}
_WIDE = (*expanded(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_qkv,to_out.0}}"), f"{_BLOCK}.attn2.to_q")

FAMILIES = (
    Family(
        name="pixart",
        title="PixArt",
        names=paired(_PIXART),
        fused=_FUSED,
        text_encoders=dict.fromkeys(("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5),)),
        blocks={"transformer_blocks": 28},
        columns=dict.fromkeys(_WIDE, (1152,)),
        hints=("pixart",),
        writing=(Writing("component", False),),
    ),
    Family(
        name="sana",
        title="Sana",
        names=paired(_SANA),
        fused=_FUSED,
        text_encoders=dict.fromkeys(("te", "te1", "text_encoder"), (("text_encoder", LANGUAGE),)),
        blocks={"transformer_blocks": 60},
        columns=dict.fromkeys(_WIDE, (2240, 1152)),
        hints=("sana",),
        writing=(Writing("component", False),),
    ),
)
