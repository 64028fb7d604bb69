"""Wan 2.1 and 2.2, text and image to video, and VACE."""

from __future__ import annotations

from fastlora.dialects.encoders import T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, same

_ATTENTION = {
    "{attn1,attn2}.{to_q,to_k,to_v,to_out.0}": "{self_attn,cross_attn}.{q,k,v,o}",
    "{attn1,attn2}.{norm_q,norm_k}": "{self_attn,cross_attn}.{norm_q,norm_k}",
    "attn2.{add_k_proj,add_v_proj,norm_added_k}": "cross_attn.{k_img,v_img,norm_k_img}",
    "ffn.net.{0.proj,2}": "ffn.{0,2}",
    "norm2": "norm3",
    "{attn1.to_qkv,attn2.to_kv,attn2.to_added_kv}": "",
}
_NAMES = {
    **{f"blocks.#.{a}": b and f"blocks.#.{b}" for a, b in _ATTENTION.items()},
    **{f"vace_blocks.#.{a}": b and f"vace_blocks.#.{b}" for a, b in _ATTENTION.items()},
    "vace_blocks.#.{proj_in,proj_out}": "vace_blocks.#.{before_proj,after_proj}",
    **same("patch_embedding", "vace_patch_embedding"),
    "proj_out": "head.head",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.{time_embedder,text_embedder}.{linear_1,linear_2}": "{time_embedding,text_embedding}.{0,2}",
    "condition_embedder.image_embedder.{norm1,ff.net.0.proj,ff.net.2,norm2}": "img_emb.proj.{0,1,3,4}",
}
_WIDE = ("blocks.#.attn1.{to_q,to_k,to_v,to_out.0}", "blocks.#.attn2.{to_q,to_out.0}", "blocks.#.ffn.net.0.proj")

FAMILIES = (
    Family(
        name="wan",
        title="Wan",
        names=paired(_NAMES),
        fused={
            **fused("blocks.#.attn1", "to_qkv"),
            **fused("blocks.#.attn2", "to_kv", "to_added_kv"),
            **fused("vace_blocks.#.attn1", "to_qkv"),
            **fused("vace_blocks.#.attn2", "to_kv", "to_added_kv"),
        },
        text_encoders=dict.fromkeys(("te", "te1", "t5xxl", "umt5_xxl", "text_encoder"), (("text_encoder", T5),)),
        blocks={"blocks": 40},
        columns={name: (1536, 3072, 5120) for pattern in _WIDE for name in expanded(pattern)},
        hints=("wan",),
        aliases=("wan21", "wan22"),
        writing=(Writing("diffusion_model", True),),
    ),
)
