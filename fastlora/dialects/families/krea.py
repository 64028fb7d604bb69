"""Krea 2."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired

_BLOCKS = {
    "transformer_blocks.#": "blocks.#",
    **{f"text_fusion.{kind}.#": f"txtfusion.{kind}.#" for kind in ("layerwise_blocks", "refiner_blocks")},
}
_QKV = "{to_q,to_k,to_v,to_out.0}"
_NAMES = {
    **{f"{a}.attn.{_QKV}": f"{b}.attn.{{wq,wk,wv,wo}}" for a, b in _BLOCKS.items()},
    **{f"{a}.attn.to_gate": f"{b}.attn.gate" for a, b in _BLOCKS.items()},
    **{f"{a}.attn.{{norm_q,norm_k}}": f"{b}.attn.qknorm.{{qnorm,knorm}}" for a, b in _BLOCKS.items()},
    **{f"{a}.ff.{{gate,up,down}}": f"{b}.mlp.{{gate,up,down}}" for a, b in _BLOCKS.items()},
    **{f"{a}.{{norm1,norm2}}": f"{b}.{{prenorm,postnorm}}" for a, b in _BLOCKS.items()},
    "img_in": "first",
    "time_embed.{linear_1,linear_2}": "tmlp.{0,2}",
    "time_mod_proj": "tproj.1",
    "text_fusion.projector": "txtfusion.projector",
    "txt_in.{norm,linear_1,linear_2}": "txtmlp.{0,1,3}",
    "final_layer.{norm,linear}": "last.{norm,linear}",
}

FAMILIES = (
    Family(
        name="krea2",
        title="Krea 2",
        names=paired(_NAMES),
        text_encoders=dict.fromkeys(("te", "te1", "text_encoder"), (("text_encoder", LANGUAGE),)),
        columns=dict.fromkeys(expanded(f"transformer_blocks.#.attn.{_QKV}"), (6144,)),
        hints=("krea2",),
        writing=(Writing("diffusion_model", True), Writing("component", False)),
    ),
)
