"""CogVideoX, under the names of diffusers only."""

from __future__ import annotations

from fastlora.dialects.encoders import T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours

_BLOCK = "transformer_blocks.#"
_NAMES = ours(
    f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_out.0,norm_q,norm_k,to_qkv}}",
    f"{_BLOCK}.{{norm1,norm2}}.{{linear,norm}}",
    f"{_BLOCK}.ff.net.{{0.proj,2}}",
    "patch_embed.{proj,text_proj}",
    "{time_embedding,ofs_embedding}.{linear_1,linear_2}",
    "{norm_final,norm_out.linear,norm_out.norm,proj_out}",
)

FAMILIES = (
    Family(
        name="cogvideox",
        title="CogVideoX",
        names=paired(_NAMES),
        fused=fused(f"{_BLOCK}.attn1", "to_qkv"),
        text_encoders=dict.fromkeys(("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5),)),
        blocks={"transformer_blocks": 42},
        columns=dict.fromkeys(expanded(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_out.0}}"), (1920, 3072)),
        hints=("cogvideox",),
        writing=(Writing("component", False),),
    ),
)
