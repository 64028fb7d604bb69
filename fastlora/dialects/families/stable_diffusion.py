"""Stable Diffusion 1, 2 and XL, and the refiner of XL: one UNet, numbered by level and layer in diffusers and by
position in the original code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastlora.dialects.encoders import CLIP
from fastlora.dialects.family import Family, Fused, Writing
from fastlora.dialects.patterns import Table, paired
from fastlora.dialects.projections import fused, ours

LAYERS = 2
"""Layers of a level of the encoder; a level of the decoder has one more."""
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "{conv_norm_out,conv_out}": "out.{0,2}",
    "time_embedding.{linear_1,linear_2}": "time_embed.{0,2}",
}
_ADDED = {"add_embedding.{linear_1,linear_2}": "label_emb.0.{0,2}"}
_RESNET = {
    "{norm1,conv1}": "in_layers.{0,2}",
    "{norm2,conv2}": "out_layers.{0,3}",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = (
    "{attn1,attn2}.{to_q,to_k,to_v,to_out.0}",
    "ff.net.{0.proj,2}",
    "{norm1,norm2,norm3}",
)


def _resnet(here: str, there: str) -> dict[str, str]:
    return {f"{here}.{a}": f"{there}.{b}" for a, b in _RESNET.items()}


def _attention(here: str, there: str, depth: int) -> dict[str, str]:
    """The modules of a spatial transformer; one of a single block has this block's number 0 in all names."""
    number = "0" if depth == 1 else "#"
    block = f"transformer_blocks.{number}"
    leaves = ("norm", "{proj_in,proj_out}", *(f"{block}.{leaf}" for leaf in _BLOCK))
    rows = {f"{here}.{leaf}": f"{there}.{leaf}" for leaf in leaves}
    return rows | ours(f"{here}.{block}.attn1.to_qkv", f"{here}.{block}.attn2.to_kv")


def _unet(down: Mapping[int, int], up: Iterable[int], levels: int, added: bool) -> dict[str, str]:
    """``{diffusers pattern: original pattern}`` of a UNet.

    ``down``: the levels of the encoder that have attention, and how many transformer blocks each has; ``up``: those of
    the decoder.
    """
    step, most = LAYERS + 1, max(down.values())
    rows = _ENDS | (_ADDED if added else {})
    for i in range(2):
        rows |= _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    rows |= _attention("mid_block.attentions.0", "middle_block.1", most)
    for level in range(levels):
        for i in range(LAYERS):
            entry = f"input_blocks.{1 + step * level + i}"
            rows |= _resnet(f"down_blocks.{level}.resnets.{i}", f"{entry}.0")
            if level in down:
                rows |= _attention(f"down_blocks.{level}.attentions.{i}", f"{entry}.1", most)
        for i in range(LAYERS + 1):
            entry = f"output_blocks.{step * level + i}"
            rows |= _resnet(f"up_blocks.{level}.resnets.{i}", f"{entry}.0")
            if level in up:
                rows |= _attention(f"up_blocks.{level}.attentions.{i}", f"{entry}.1", most)
        if level < levels - 1:
            rows[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{step * (level + 1)}.0.op"
            part = 2 if level in up else 1
            rows[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{step * level + LAYERS}.{part}.conv"
    return paired(rows)


def _columns(names: Iterable[str], channels: tuple[int, ...], text: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The columns of what reads the picture, in the attention of each level, and of what reads the text.

    ``channels``: of the levels of the encoder, which are those of the decoder from its end. ``text``: widths.
    """
    columns: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            columns[name] = text
        elif name.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn1.to_qkv", ".attn2.to_q")):
            side, level = name.split(".")[:2]
            levels = {"down_blocks": channels, "up_blocks": channels[::-1]}.get(side)
            columns[name] = (levels[int(level)] if levels else channels[-1],)
    return columns


def _fused(names: Iterable[str]) -> dict[str, Fused]:
    """What diffusers makes of projections when it fuses them."""
    rows: dict[str, Fused] = {}
    for name in names:
        attention, _, leaf = name.rpartition(".")
        if leaf in ("to_qkv", "to_kv"):
            rows |= fused(attention, leaf)
    return rows


def _encoders(first: Iterable[str], second: Iterable[str]) -> dict[str, tuple[tuple[str, Table], ...]]:
    return {
        **dict.fromkeys(first, (("text_encoder", CLIP),)),
        **dict.fromkeys(second, (("text_encoder_2", CLIP),)),
    }


_SD = _unet({0: 1, 1: 1, 2: 1}, (1, 2, 3), 4, added=False)
_XL = _unet({1: 2, 2: 10}, (0, 1), 3, added=True)
_REFINER = _unet({1: 4, 2: 4}, (1, 2), 4, added=True)
_TWO = _encoders(("te", "te1", "clip_l", "text_encoder"), ("te2", "clip_g", "text_encoder_2"))

FAMILIES = (
    Family(
        name="sd15",
        title="Stable Diffusion 1 or 2",
        names=_SD,
        fused=_fused(_SD),
        text_encoders=_encoders(("te", "te1", "clip_l", "clip_h", "text_encoder"), ()),
        columns=_columns(_SD, (320, 640, 1280, 1280), (768, 1024)),
        hints=("stablediffusionv1", "stablediffusionv2", "sdv1", "sdv2", "sd1", "sd2"),
        aliases=("sd1", "sd2", "sd21"),
        writing=(Writing("kohya-diffusers", False),),
    ),
    Family(
        name="sdxl",
        title="Stable Diffusion XL",
        names=_XL,
        fused=_fused(_XL),
        text_encoders=_TWO,
        columns=_columns(_XL, (320, 640, 1280), (2048,)),
        hints=("stablediffusionxl", "sdxl"),
        aliases=("xl",),
        writing=(Writing("kohya-original", True),),
    ),
    Family(
        name="sdxl_refiner",
        title="the refiner of Stable Diffusion XL",
        names=_REFINER,
        fused=_fused(_REFINER),
        text_encoders=_encoders((), ("te", "te2", "clip_g", "text_encoder_2")),
        columns=_columns(_REFINER, (384, 768, 1536, 1536), (1280,)),
        hints=("stablediffusionxlv1refiner", "sdxlrefiner"),
        writing=(Writing("kohya-original", True),),
    ),
)
