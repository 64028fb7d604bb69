"""Families whose files are read under the names of diffusers only."""

from __future__ import annotations

from fastlora.dialects.encoders import CLIP, LANGUAGE
from fastlora.dialects.family import Family, Writing
from fastlora.dialects.patterns import Table, expanded, paired
from fastlora.dialects.projections import fused, ours

_BLOCK, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_QKV, _ADDED = "{to_q,to_k,to_v,to_out.0}", "{add_q_proj,add_k_proj,add_v_proj,to_add_out}"
_TWO = "{linear_1,linear_2}"
_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_HUNYUAN = (
    f"{_BLOCK}.attn.{_QKV}",
    f"{_BLOCK}.attn.{_ADDED}",
    f"{_BLOCK}.attn.{{norm_q,norm_k,norm_added_q,norm_added_k,to_qkv,to_added_qkv}}",
    f"{_BLOCK}.{{norm1,norm1_context}}.linear",
    f"{_BLOCK}.{{ff,ff_context}}.net.{{0.proj,2}}",
    f"{_REFINER}.attn.{_QKV}",
    f"{_REFINER}.{{norm1,norm2,norm_out.linear,ff.net.0.proj,ff.net.2}}",
    "context_embedder.proj_in",
    f"context_embedder.time_text_embed.{{timestep_embedder,text_embedder}}.{_TWO}",
    "{x_embedder.proj,norm_out.linear,proj_out}",
)
_KANDINSKY = "{text_transformer_blocks,visual_transformer_blocks}.#"
_ATTENTION = "{to_query,to_key,to_value,query_norm,key_norm,out_layer}"


def _family(
    name: str, title: str, *patterns: str, text: dict[str, tuple[tuple[str, Table], ...]], width: dict[str, int]
) -> Family:
    """``width``: columns of the published model, by pattern."""
    names = paired(ours(*patterns))
    projections = {k: v for k, v in fused(f"{_BLOCK}.attn", "to_qkv", "to_added_qkv").items() if k in names}
    return Family(
        name=name,
        title=title,
        names=names,
        fused=projections,
        text_encoders=text,
        columns={k: (columns,) for pattern, columns in width.items() for k in expanded(pattern)},
        hints=(name.replace("_", ""),),
        writing=(Writing("component", False),),
    )


def _first(*tables: Table) -> dict[str, tuple[tuple[str, Table], ...]]:
    return dict.fromkeys(("te", "te1", "text_encoder"), tuple(("text_encoder", table) for table in tables))


FAMILIES = (
    _family(
        "cogview4",
        "CogView4",
        f"{_BLOCK}.attn1.{_QKV}",
        f"{_BLOCK}.{{norm1.linear,ff.net.0.proj,ff.net.2}}",
        "{patch_embed.proj,patch_embed.text_proj,norm_out.linear,proj_out}",
        f"time_condition_embed.{{timestep_embedder,condition_embedder}}.{_TWO}",
        text=_first(LANGUAGE),
        width={f"{_BLOCK}.attn1.{_QKV}": 2560},
    ),
    _family(
        "hunyuan_video15",
        "HunyuanVideo 1.5",
        *_HUNYUAN,
        "image_embedder.{norm_in,linear_1,linear_2,norm_out}",
        "context_embedder_2.{norm,linear_1,linear_2,linear_3}",
        f"time_embed.timestep_embedder.{_TWO}",
        "cond_type_embed",
        text=_first(LANGUAGE),
        width={f"{_BLOCK}.attn.{_QKV}": 2048, f"{_BLOCK}.attn.{_ADDED}": 2048},
    ),
    _family(
        "hunyuan_image",
        "HunyuanImage",
        *_HUNYUAN,
        f"{_SINGLE}.{{attn.to_q,attn.to_k,attn.to_v,attn.norm_q,attn.norm_k,norm.linear,proj_mlp,proj_out}}",
        f"time_guidance_embed.timestep_embedder.{_TWO}",
        text=_first(LANGUAGE),
        width={
            f"{_BLOCK}.attn.{_QKV}": 3584,
            f"{_BLOCK}.attn.{_ADDED}": 3584,
            f"{_SINGLE}.attn.{{to_q,to_k,to_v}}": 3584,
        },
    ),
    _family(
        "kandinsky5",
        "Kandinsky 5",
        f"{_KANDINSKY}.self_attention.{_ATTENTION}",
        f"visual_transformer_blocks.#.cross_attention.{_ATTENTION}",
        f"{_KANDINSKY}.feed_forward.{{in_layer,out_layer}}",
        "{text_transformer_blocks.#.text_modulation,visual_transformer_blocks.#.visual_modulation}.out_layer",
        "time_embeddings.{in_layer,out_layer}",
        "{text_embeddings,pooled_text_embeddings}.{in_layer,norm}",
        "{visual_embeddings.in_layer,out_layer.modulation.out_layer,out_layer.out_layer}",
        text={**_first(LANGUAGE), **dict.fromkeys(("te2", "clip_l", "text_encoder_2"), (("text_encoder_2", CLIP),))},
        width={},
    ),
)
