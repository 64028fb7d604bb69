"""LTX-Video, and LTX-2, which has its names and those of sound."""

from __future__ import annotations

from fastlora.dialects.encoders import LANGUAGE, T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, ours, same

_BLOCK = "transformer_blocks.#"
_OF_BLOCK = "attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"
_CROSS = "{video_scale_shift,audio_scale_shift,video_a2v_gate,audio_v2a_gate}"
_THEIR_CROSS = "{video_scale_shift,audio_scale_shift,a2v_gate,v2a_gate}"
_LAYER = "{linear,emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2}"
_NAMES = {
    **same(*(f"{_BLOCK}.{attention}.{{to_q,to_k,to_v,to_out.0,to_gate_logits}}" for attention in _OF_BLOCK)),
    **{f"{_BLOCK}.{attention}.{{norm_q,norm_k}}": f"{_BLOCK}.{attention}.{{q_norm,k_norm}}" for attention in _OF_BLOCK},
    **same(
        f"{_BLOCK}.{{ff,audio_ff}}.net.{{0.proj,2}}",
        "{caption_projection,audio_caption_projection}.{linear_1,linear_2}",
    ),
    **ours(f"{_BLOCK}.{{attn1.to_qkv,attn2.to_kv}}"),
    "{proj_in,audio_proj_in}": "{patchify_proj,audio_patchify_proj}",
    "{proj_out,audio_proj_out}": "{proj_out,audio_proj_out}",
    f"{{time_embed,audio_time_embed}}.{_LAYER}": f"{{adaln_single,audio_adaln_single}}.{_LAYER}",
    f"{{prompt_adaln,audio_prompt_adaln}}.{_LAYER}": f"{{prompt_adaln_single,audio_prompt_adaln_single}}.{_LAYER}",
    f"av_cross_attn_{_CROSS}.{_LAYER}": f"av_ca_{_THEIR_CROSS}_adaln_single.{_LAYER}",
}

FAMILIES = (
    Family(
        name="ltx_video",
        title="LTX-Video",
        names=paired(_NAMES),
        fused={**fused(f"{_BLOCK}.attn1", "to_qkv"), **fused(f"{_BLOCK}.attn2", "to_kv")},
        text_encoders=dict.fromkeys(
            ("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5), ("text_encoder", LANGUAGE))
        ),
        blocks={"transformer_blocks": 48},
        columns=dict.fromkeys(expanded(f"{_BLOCK}.attn1.{{to_q,to_k,to_v,to_out.0}}"), (2048, 4096)),
        hints=("ltx",),
        aliases=("ltx", "ltx2"),
        writing=(Writing("diffusion_model", False),),
    ),
)
