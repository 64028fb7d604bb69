"""Names of the modules of text encoders, as transformers has them."""

from __future__ import annotations

from fastlora.dialects.patterns import Table, expanded, paired

_NORMS = ("layer_norm1", "layer_norm2")
_LAYER = ("self_attn.{q_proj,k_proj,v_proj,out_proj}", "mlp.{fc1,fc2}", *_NORMS)
_CLIP = {
    **{f"text_model.encoder.layers.#.{leaf}": "" for leaf in _LAYER},
    "text_model.embeddings.{token_embedding,position_embedding}": "",
    "text_model.final_layer_norm": "",
    "text_projection": "",
}
# transformers ≥ 5.6 has no `text_model` in a CLIPTextModel, and diffusers before PEFT named its layers as in a UNet.
_OLD_LEAVES = {"{to_q,to_k,to_v,to_out}": "{q_proj,k_proj,v_proj,out_proj}"}
_CLIP_ALSO = {
    **{
        f"text_model.encoder.layers.#.self_attn.{old}": f"text_model.encoder.layers.#.self_attn.{new}"
        for old, new in _OLD_LEAVES.items()
    },
    **{p.removeprefix("text_model."): p for p in _CLIP if p.startswith("text_model.")},
}

_T5 = {
    "encoder.block.#.layer.0.SelfAttention.{q,k,v,o}": "",
    "encoder.block.#.layer.0.SelfAttention.relative_attention_bias": "",  # T5: block 0; UMT5: every block
    "encoder.block.#.layer.1.DenseReluDense.{wi,wi_0,wi_1,wo}": "",
    "encoder.block.#.layer.{0,1}.layer_norm": "",
    "encoder.final_layer_norm": "",
    "{shared,encoder.embed_tokens}": "",
}
_LANGUAGE = {
    f"{where}layers.#.{leaf}": ""
    for where in ("", "model.", "model.language_model.", "language_model.")
    for leaf in (
        "self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "mlp.{gate_proj,up_proj,down_proj}",
        "{input_layernorm,post_attention_layernorm,pre_feedforward_layernorm,post_feedforward_layernorm}",
        "self_attn.{q_norm,k_norm}",
    )
}


def _also(rows: dict[str, str]) -> dict[str, str]:
    return {a: b for old, new in rows.items() for a, b in zip(expanded(old), expanded(new), strict=True)}


CLIP = Table(paired(_CLIP), _also(_CLIP_ALSO))
"""CLIP-L, CLIP-G (OpenCLIP) and those of Stable Diffusion 2: ``text_model.`` is always in the path."""
T5 = Table(paired(_T5))
"""The encoder of T5 and UMT5."""
LANGUAGE = Table(paired(_LANGUAGE))
"""Llama, Qwen, Gemma and their kin: each under the path that the file has."""
