"""Flux.1 (dev, schnell, Fill, Kontext, Control) and Chroma, whose blocks have the same names."""

from __future__ import annotations

from fractions import Fraction

from fastlora.dialects.encoders import CLIP, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, fused_with_mlp, ours

_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_EMBEDDERS = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
_NAMES = {
    **ours(f"{_DOUBLE}.attn.{{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}}"),
    f"{_DOUBLE}.attn.{{to_qkv,to_added_qkv}}": "double_blocks.#.{img_attn,txt_attn}.qkv",
    f"{_DOUBLE}.attn.{{to_out.0,to_add_out}}": "double_blocks.#.{img_attn,txt_attn}.proj",
    f"{_DOUBLE}.attn.{{norm_q,norm_k}}": "double_blocks.#.img_attn.norm.{query_norm,key_norm}",
    f"{_DOUBLE}.attn.{{norm_added_q,norm_added_k}}": "double_blocks.#.txt_attn.norm.{query_norm,key_norm}",
    f"{_DOUBLE}.{{norm1,norm1_context}}.linear": "double_blocks.#.{img_mod,txt_mod}.lin",
    f"{_DOUBLE}.{{ff,ff_context}}.net.{{0.proj,2}}": "double_blocks.#.{img_mlp,txt_mlp}.{0,2}",
    **ours(f"{_SINGLE}.attn.{{to_q,to_k,to_v,to_qkv}}", f"{_SINGLE}.proj_mlp"),
    f"{_SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.#.linear1",
    f"{_SINGLE}.proj_out": "single_blocks.#.linear2",
    f"{_SINGLE}.attn.{{norm_q,norm_k}}": "single_blocks.#.norm.{query_norm,key_norm}",
    f"{_SINGLE}.norm.linear": "single_blocks.#.modulation.lin",
    "{x_embedder,context_embedder}": "{img_in,txt_in}",
    **{
        f"time_text_embed.{here}_embedder.{{linear_1,linear_2}}": f"{there}.{{in_layer,out_layer}}"
        for here, there in _EMBEDDERS.items()
    },
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    # Chroma makes all modulations in one small network.
    "distilled_guidance_layer.{in_proj,out_proj}": "distilled_guidance_layer.{in_proj,out_proj}",
    "distilled_guidance_layer.layers.#.{linear_1,linear_2}": "distilled_guidance_layer.layers.#.{in_layer,out_layer}",
    "distilled_guidance_layer.norms.#": "distilled_guidance_layer.norms.#",
}
# The trainer of XLabs names its adapters by the attention processors; a suffix "_lora" may be cut with the tensor's.
_XLABS = {
    "double_blocks.#.processor.{qkv_lora1,qkv_lora2}": f"{_DOUBLE}.attn.{{to_qkv,to_added_qkv}}",
    "double_blocks.#.processor.{proj_lora1,proj_lora2}": f"{_DOUBLE}.attn.{{to_out.0,to_add_out}}",
    "single_blocks.#.processor.{qkv_lora,proj_lora}": f"{_SINGLE}.{{attn.to_qkv,proj_out}}",
    "single_blocks.#.processor.{qkv,proj}": f"{_SINGLE}.{{attn.to_qkv,proj_out}}",
}
_READS_HIDDEN = (
    f"{_DOUBLE}.attn.{{to_q,to_k,to_v,to_qkv,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}}",
    f"{_SINGLE}.attn.{{to_q,to_k,to_v,to_qkv_mlp_proj}}",
)

FAMILIES = (
    Family(
        name="flux",
        title="Flux.1 or Chroma",
        names=paired(_NAMES),
        also_read=paired(_XLABS),
        fused={
            **fused(f"{_DOUBLE}.attn", "to_qkv", "to_added_qkv"),
            **fused_with_mlp(_SINGLE),
            **fused(f"{_SINGLE}.attn", "to_qkv"),
        },
        swapped={"norm_out.linear": True},
        # sd-scripts calls T5 te3, OneTrainer te2.
        text_encoders={
            **dict.fromkeys(("te", "te1", "clip_l", "text_encoder"), (("text_encoder", CLIP),)),
            **dict.fromkeys(("te2", "te3", "t5xxl", "text_encoder_2"), (("text_encoder_2", T5),)),
        },
        blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
        columns={name: (3072,) for pattern in _READS_HIDDEN for name in expanded(pattern)},
        ratios={
            f"{_SINGLE}.attn.to_qkv_mlp_proj": 7,
            f"{_SINGLE}.proj_out": Fraction(1, 5),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.net.0.proj"), 4),
            **dict.fromkeys(expanded(f"{_DOUBLE}.{{ff,ff_context}}.net.2"), Fraction(1, 4)),
        },
        hints=("flux1", "flux", "chroma"),
        aliases=("flux1", "chroma", "kontext"),
        writing=(
            Writing("kohya-original", True, ("transformer_blocks.", "single_transformer_blocks.")),
            Writing("component", False),
        ),
    ),
)
