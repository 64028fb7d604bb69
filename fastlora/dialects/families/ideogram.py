"""Ideogram 4, whose layers have the names of Z-Image but for the output of attention."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours, same

_LAYER = "layers.#"
_NAMES = {
    **ours(f"{_LAYER}.attention.{{to_q,to_k,to_v,norm_q,norm_k}}"),
    f"{_LAYER}.attention.{{to_qkv,to_out.0}}": f"{_LAYER}.attention.{{qkv,o}}",
    **same(f"{_LAYER}.{{feed_forward.w1,feed_forward.w2,feed_forward.w3,adaln_modulation}}"),
    # What the original code calls these is not known here.
    **ours(
        f"{_LAYER}.{{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}}",
        "{input_proj,llm_cond_norm,llm_cond_proj,adaln_proj,embed_image_indicator}",
        "{t_embedding.mlp_in,t_embedding.mlp_out,final_layer.linear,final_layer.adaln_modulation}",
    ),
}
_WIDE = (f"{_LAYER}.attention.{{to_q,to_k,to_v,to_qkv,to_out.0}}", f"{_LAYER}.feed_forward.{{w1,w3}}")

FAMILIES = (
    Family(
        name="ideogram4",
        title="Ideogram 4",
        names=paired(_NAMES),
        fused=fused(f"{_LAYER}.attention", "to_qkv"),
        text_encoders=dict.fromkeys(("te", "te1", "text_encoder"), (("text_encoder", LANGUAGE),)),
        columns={name: (4608,) for pattern in _WIDE for name in expanded(pattern)},
        ratios={f"{_LAYER}.attention.to_qkv": 3},
        hints=("ideogram4",),
        writing=(Writing("component", False), Writing("diffusion_model", True)),
    ),
)
