"""AuraFlow."""

from __future__ import annotations

from fastlora.dialects.encoders import T5
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import paired
from fastlora.dialects.projections import fused, ours

_DOUBLE, _SINGLE = "joint_transformer_blocks.#", "single_transformer_blocks.#"
_LAYERS = "{linear_1,linear_2,out_projection}", "{c_fc1,c_fc2,c_proj}"
_NAMES = {
    f"{_DOUBLE}.attn.{{to_q,to_k,to_v,to_out.0}}": "double_layers.#.attn.{w2q,w2k,w2v,w2o}",
    f"{_DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj,to_add_out}}": "double_layers.#.attn.{w1q,w1k,w1v,w1o}",
    f"{_DOUBLE}.{{norm1,norm1_context}}.linear": "double_layers.#.{modX,modC}.1",
    f"{_DOUBLE}.{{ff,ff_context}}.{_LAYERS[0]}": f"double_layers.#.{{mlpX,mlpC}}.{_LAYERS[1]}",
    f"{_SINGLE}.attn.{{to_q,to_k,to_v,to_out.0}}": "single_layers.#.attn.{w1q,w1k,w1v,w1o}",
    f"{_SINGLE}.norm1.linear": "single_layers.#.modCX.1",
    f"{_SINGLE}.ff.{_LAYERS[0]}": f"single_layers.#.mlp.{_LAYERS[1]}",
    **ours(f"{_DOUBLE}.attn.{{to_qkv,to_added_qkv}}", f"{_SINGLE}.attn.to_qkv"),
    "pos_embed.proj": "init_x_linear",
    "context_embedder": "cond_seq_linear",
    "time_step_proj.{linear_1,linear_2}": "t_embedder.mlp.{0,2}",
    "norm_out.linear": "modF.1",
    "proj_out": "final_linear",
}

FAMILIES = (
    Family(
        name="auraflow",
        title="AuraFlow",
        names=paired(_NAMES),
        fused={**fused(f"{_DOUBLE}.attn", "to_qkv", "to_added_qkv"), **fused(f"{_SINGLE}.attn", "to_qkv")},
        swapped={"norm_out.linear": True},
        text_encoders=dict.fromkeys(("te", "te1", "t5xxl", "text_encoder"), (("text_encoder", T5),)),
        hints=("auraflow",),
        writing=(Writing("component", False),),
    ),
)
