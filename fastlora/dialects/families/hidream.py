"""HiDream-I1, whose original code has the names of diffusers."""

from __future__ import annotations

from fastlora.dialects.encoders import CLIP, LANGUAGE, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import same

_DOUBLE, _SINGLE = "double_stream_blocks.#.block", "single_stream_blocks.#.block"
_ATTENTION = "attn1.{to_q,to_k,to_v,to_out,q_rms_norm,k_rms_norm}"
_EXPERTS = ("ff_i.{shared_experts,experts.#}.{w1,w2,w3}", "ff_i.gate", "adaLN_modulation.1")
_NAMES = same(
    *(f"{block}.{leaf}" for block in (_DOUBLE, _SINGLE) for leaf in (_ATTENTION, *_EXPERTS)),
    f"{_DOUBLE}.attn1.{{to_q_t,to_k_t,to_v_t,to_out_t,q_rms_norm_t,k_rms_norm_t}}",
    f"{_DOUBLE}.ff_t.{{w1,w2,w3}}",
    "t_embedder.timestep_embedder.{linear_1,linear_2}",
    "p_embedder.pooled_embedder.{linear_1,linear_2}",
    "{x_embedder.proj,final_layer.linear,final_layer.adaLN_modulation.1}",
    "caption_projection.#.linear",
)

FAMILIES = (
    Family(
        name="hidream",
        title="HiDream",
        names=paired(_NAMES),
        text_encoders={
            **dict.fromkeys(("te", "te1", "clip_l", "text_encoder"), (("text_encoder", CLIP),)),
            **dict.fromkeys(("te2", "clip_g", "text_encoder_2"), (("text_encoder_2", CLIP),)),
            **dict.fromkeys(("te3", "t5xxl", "text_encoder_3"), (("text_encoder_3", T5),)),
            **dict.fromkeys(("te4", "llama", "text_encoder_4"), (("text_encoder_4", LANGUAGE),)),
        },
        columns=dict.fromkeys(expanded(f"{_DOUBLE}.attn1.{{to_q,to_k,to_v,to_out}}"), (2560,)),
        hints=("hidream",),
        writing=(Writing("diffusion_model", False),),
    ),
)
