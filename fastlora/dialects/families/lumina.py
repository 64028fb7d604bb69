"""Z-Image and Lumina-Image 2, which have one layout: queries, keys and values fused in the original code."""

from __future__ import annotations

from fractions import Fraction

from fastlora.dialects.encoders import LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import expanded, paired
from fastlora.dialects.projections import fused, grouped, same

_LAYERS = ("layers.#", "noise_refiner.#", "context_refiner.#")
_MODULATED = _LAYERS[:2]
_TEXT = dict.fromkeys(("te", "te1", "text_encoder"), (("text_encoder", LANGUAGE),))


def _each(layers: tuple[str, ...], rows: dict[str, str]) -> dict[str, str]:
    return {f"{layer}.{a}": b and f"{layer}.{b}" for layer in layers for a, b in rows.items()}


_Z_IMAGE = {
    **_each(
        _LAYERS,
        {
            "attention.{to_q,to_k,to_v}": "",
            "attention.{to_qkv,to_out.0,norm_q,norm_k}": "attention.{qkv,out,q_norm,k_norm}",
            **same("feed_forward.{w1,w2,w3}", "{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}"),
        },
    ),
    **_each(_MODULATED, same("adaLN_modulation.0")),
    **same("cap_embedder.{0,1}", "t_embedder.mlp.{0,2}"),
    # diffusers numbers these by the size of a patch.
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.{linear,adaLN_modulation.1}": "final_layer.{linear,adaLN_modulation.1}",
}
_LUMINA = {
    **_each(
        _LAYERS,
        {
            "attn.{to_q,to_k,to_v}": "",
            "attn.{to_qkv,to_out.0,norm_q,norm_k}": "attention.{qkv,out,q_norm,k_norm}",
            "feed_forward.{linear_1,linear_2,linear_3}": "feed_forward.{w1,w2,w3}",
            "{norm2,ffn_norm1,ffn_norm2}": "{attention_norm2,ffn_norm1,ffn_norm2}",
        },
    ),
    **_each(_MODULATED, {"norm1.{linear,norm}": "{adaLN_modulation.1,attention_norm1}"}),
    "context_refiner.#.norm1": "context_refiner.#.attention_norm1",
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.{linear_1,linear_2}": "t_embedder.mlp.{0,2}",
    "time_caption_embed.caption_embedder.{0,1}": "cap_embedder.{0,1}",
    "norm_out.{linear_1,linear_2}": "final_layer.{adaLN_modulation.1,linear}",
}


def _qkv(attention: str) -> list[str]:
    return [f"{layer}.{attention}.to_qkv" for layer in _LAYERS]


def _reads_hidden(attention: str, feed_forward: str) -> list[str]:
    leaves = (f"{attention}.{{to_q,to_k,to_v,to_qkv,to_out.0}}", f"feed_forward.{feed_forward}")
    return [name for layer in _LAYERS for leaf in leaves for name in expanded(f"{layer}.{leaf}")]


FAMILIES = (
    Family(
        name="z_image",
        title="Z-Image",
        names=paired(_Z_IMAGE),
        fused={k: v for layer in _LAYERS for k, v in fused(f"{layer}.attention", "to_qkv").items()},
        text_encoders=_TEXT,
        blocks={"layers": 30, "noise_refiner": 2, "context_refiner": 2},
        columns=dict.fromkeys(_reads_hidden("attention", "{w1,w3}"), (3840,)),
        ratios=dict.fromkeys(_qkv("attention"), 3),
        hints=("zimage",),
        writing=(Writing("diffusion_model", False),),
    ),
    Family(
        name="lumina2",
        title="Lumina-Image 2",
        names=paired(_LUMINA),
        fused={k: v for layer in _LAYERS for k, v in fused(f"{layer}.attn", "to_qkv", rows=grouped).items()},
        text_encoders=_TEXT,
        blocks={"layers": 26, "noise_refiner": 2, "context_refiner": 2},
        columns=dict.fromkeys(_reads_hidden("attn", "{linear_1,linear_3}"), (2304,)),
        ratios=dict.fromkeys(_qkv("attn"), Fraction(5, 3)),
        hints=("lumina",),
        aliases=("lumina",),
        writing=(Writing("diffusion_model", True),),
    ),
)
