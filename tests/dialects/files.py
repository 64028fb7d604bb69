"""Small single files of every family and dialect, and the ``ΔW`` that each means.

The rows below are written by hand: what the diffusers model calls a module, what the original code calls it, and the
shape of its weight. Nothing of the package is used, so that they can be held against it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One module. ``swapped``: the original code has the halves of its rows in the other order."""

    path: str
    original: str
    shape: Shape
    swapped: bool = False


def rows(*table: tuple[str, str, Shape] | tuple[str, str, Shape, bool]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in table)


H = 24
LINEAR, WIDE, FUSED = (H, H), (4 * H, H), (3 * H, H)
CONV, DOWN = (16, 8, 3, 3), (16, 16, 3, 3)

FAMILIES: Mapping[str, tuple[Row, ...]] = {
    "sd15": rows(
        ("conv_in", "input_blocks.0.0", (16, 4, 3, 3)),
        ("time_embedding.linear_1", "time_embed.0", WIDE),
        ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in", (16, 16, 1, 1)),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
         "input_blocks.2.1.transformer_blocks.0.attn1.to_q", LINEAR),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", DOWN),
        ("down_blocks.3.resnets.1.conv1", "input_blocks.11.0.in_layers.2", CONV),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1", LINEAR),
        ("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k",
         "output_blocks.5.1.transformer_blocks.0.attn2.to_k", (H, 768)),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
         "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0", LINEAR),
        ("up_blocks.2.upsamplers.0.conv", "output_blocks.8.2.conv", DOWN),
        ("up_blocks.3.resnets.0.conv_shortcut", "output_blocks.9.0.skip_connection", (16, 8, 1, 1)),
    ),
    "sdxl": rows(
        ("add_embedding.linear_2", "label_emb.0.2", LINEAR),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v",
         "input_blocks.4.1.transformer_blocks.1.attn2.to_v", (H, 2048)),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
         "middle_block.1.transformer_blocks.9.ff.net.0.proj", WIDE),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", DOWN),
        ("up_blocks.1.resnets.2.conv2", "output_blocks.5.0.out_layers.3", DOWN),
    ),
    "flux": rows(
        ("transformer_blocks.3.attn.to_qkv", "double_blocks.3.img_attn.qkv", FUSED),
        ("transformer_blocks.0.attn.to_added_qkv", "double_blocks.0.txt_attn.qkv", FUSED),
        ("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", (6 * H, H)),
        ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", (H, 4 * H)),
        ("single_transformer_blocks.7.attn.to_qkv_mlp_proj", "single_blocks.7.linear1", (7 * H, H)),
        ("single_transformer_blocks.7.proj_out", "single_blocks.7.linear2", (H, 5 * H)),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", LINEAR),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * H, H), True),
    ),
    "flux2": rows(
        ("transformer_blocks.0.attn.to_qkv", "double_blocks.0.img_attn.qkv", FUSED),
        ("transformer_blocks.0.ff.linear_in", "double_blocks.0.img_mlp.0", (6 * H, H)),
        ("single_transformer_blocks.1.attn.to_qkv_mlp_proj", "single_blocks.1.linear1", (9 * H, H)),
        ("single_transformer_blocks.1.attn.to_out", "single_blocks.1.linear2", (H, 4 * H)),
        ("single_stream_modulation.linear", "single_stream_modulation.lin", FUSED),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * H, H), True),
    ),
    "sd3": rows(
        ("transformer_blocks.0.attn.to_qkv", "joint_blocks.0.x_block.attn.qkv", FUSED),
        ("transformer_blocks.0.attn.to_added_qkv", "joint_blocks.0.context_block.attn.qkv", FUSED),
        ("transformer_blocks.1.attn.to_add_out", "joint_blocks.1.context_block.attn.proj", LINEAR),
        ("transformer_blocks.1.ff.net.0.proj", "joint_blocks.1.x_block.mlp.fc1", WIDE),
        ("transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block.adaLN_modulation.1", (6 * H, H)),
        ("transformer_blocks.23.norm1_context.linear", "joint_blocks.23.context_block.adaLN_modulation.1",
         (2 * H, H), True),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * H, H), True),
    ),
    "wan": rows(
        ("blocks.0.attn1.to_q", "blocks.0.self_attn.q", LINEAR),
        ("blocks.0.attn2.to_out.0", "blocks.0.cross_attn.o", LINEAR),
        ("blocks.1.attn2.add_k_proj", "blocks.1.cross_attn.k_img", LINEAR),
        ("blocks.1.ffn.net.0.proj", "blocks.1.ffn.0", WIDE),
        ("condition_embedder.time_proj", "time_projection.1", (6 * H, H)),
        ("proj_out", "head.head", (16, H)),
    ),
    "hunyuan_video": rows(
        ("transformer_blocks.0.attn.to_qkv", "double_blocks.0.img_attn_qkv", FUSED),
        ("transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.fc1", WIDE),
        ("transformer_blocks.19.norm1_context.linear", "double_blocks.19.txt_mod.linear", (6 * H, H)),
        ("single_transformer_blocks.39.attn.to_qkv_mlp_proj", "single_blocks.39.linear1", (7 * H, H)),
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0",
         "txt_in.individual_token_refiner.blocks.0.self_attn_proj", LINEAR),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * H, H), True),
    ),
    "qwen_image": rows(
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", LINEAR),
        ("transformer_blocks.59.attn.add_k_proj", "transformer_blocks.59.attn.add_k_proj", LINEAR),
        ("transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.img_mlp.net.0.proj", WIDE),
        ("transformer_blocks.0.txt_mod.1", "transformer_blocks.0.txt_mod.1", (6 * H, H)),
    ),
    "z_image": rows(
        ("layers.0.attention.to_qkv", "layers.0.attention.qkv", FUSED),
        ("layers.0.attention.to_out.0", "layers.0.attention.out", LINEAR),
        ("layers.1.feed_forward.w2", "layers.1.feed_forward.w2", (H, 4 * H)),
        ("noise_refiner.0.attention.to_out.0", "noise_refiner.0.attention.out", LINEAR),
    ),
    "ltx_video": rows(
        ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q", LINEAR),
        ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_k", LINEAR),
        ("transformer_blocks.27.ff.net.2", "transformer_blocks.27.ff.net.2", (H, 4 * H)),
        ("proj_in", "patchify_proj", (H, 16)),
    ),
}  # fmt: skip
"""By family: modules of several kinds, each under both names."""
SAME_NAMES = ("qwen_image",)
"""Families whose original code has the names of diffusers."""
LAYER = "text_model.encoder.layers.0"
TEXT: Mapping[str, Shape] = {f"{LAYER}.self_attn.q_proj": (16, 16), f"{LAYER}.mlp.fc1": (32, 16)}
WITH_CLIP = ("sd15", "sdxl", "flux", "sd3")
"""Families with such a text encoder."""

Alphas = Callable[[int, int], float | None]
"""From the number of a module and its rank to its alpha, ``None`` for none."""
ALPHAS: Mapping[str, Alphas] = {
    "half the rank": lambda i, rank: rank / 2,
    "each its own": lambda i, rank: (0.5, 1.0, 3.0, 8.0)[i % 4],
    "none": lambda i, rank: None,
    "every other": lambda i, rank: rank / 2 if i % 2 else None,
    "negative": lambda i, rank: -2.0,
}


@dataclass(frozen=True)
class Dialect:
    """How names are made of rows. ``original``: of their original names. ``A``, ``B``, ``alpha``: suffixes."""

    format: str
    prefix: str
    original: bool = False
    flat: bool = False
    A: str = ".lora_down.weight"
    B: str = ".lora_up.weight"
    text: Mapping[str, str] = field(default_factory=dict)

    def stem(self, row: Row) -> str:
        name = row.original if self.original else row.path
        return self.prefix + (name.replace(".", "_") if self.flat else name)


AB = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
DIALECTS: Mapping[str, Dialect] = {
    "kohya, original names": Dialect(
        "kohya", "lora_unet_", True, True, text={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    ),
    "kohya, names of diffusers": Dialect("kohya", "lora_unet_", False, True, text={"text_encoder": "lora_te_"}),
    "lora_transformer_": Dialect("kohya", "lora_transformer_", False, True),
    "lycoris_": Dialect("kohya", "lycoris_", False, True),
    "diffusion_model, A and B": Dialect("comfy", "diffusion_model.", True, **AB),
    "diffusion_model, down and up": Dialect(
        "comfy", "diffusion_model.", True, text={"text_encoder": "text_encoders.clip_l.transformer."}
    ),
    "component": Dialect(
        "diffusers", "", **AB, text={"text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
    ),
    "component, older": Dialect("diffusers", "", A=".lora.down.weight", B=".lora.up.weight"),
    "without a prefix": Dialect("diffusers", "", A=".lora_A.default.weight", B=".lora_B.default.weight"),
}


@dataclass
class Sample:
    """``tensors`` as they lie in a file, and ``meaning``: ``{module: ΔW}`` in float64, kernels flattened."""

    tensors: dict[str, Tensor]
    meaning: dict[str, Tensor]
    stems: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(
                {k: t.clone(memory_format=torch.contiguous_format) for k, t in self.tensors.items()},
                path,
                self.metadata or None,
            )
        else:
            torch.save(self.tensors, path)
        return path


def random(name: str, *shape: int) -> Tensor:
    """Fixed numbers for a name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def sample(
    family: str,
    dialect: str,
    alphas: Alphas = ALPHAS["half the rank"],
    ranks: tuple[int, ...] = (2, 4, 3),
    dtype: torch.dtype = torch.float32,
    *,
    text: bool = True,
) -> Sample:
    """A file of a family in a dialect, with what it means."""
    how = DIALECTS[dialect]
    component = "unet." if family in ("sd15", "sdxl") else "transformer."
    result = Sample({}, {}, {})
    numbers = cycle(ranks)
    for row in FAMILIES[family]:
        stem = how.stem(row)
        if dialect.startswith("component"):
            stem = component + stem
        _add(result, how, row.path, stem, row.shape, next(numbers), alphas, dtype, row.swapped and how.original)
    for encoder, prefix in how.text.items() if text and family in WITH_CLIP else ():
        if encoder == "text_encoder_2" and family not in ("sdxl", "sd3"):
            continue
        for name, shape in TEXT.items():
            stem = prefix + (name.replace(".", "_") if how.flat else name)
            _add(result, how, f"{encoder}.{name}", stem, shape, next(numbers), alphas, dtype, False)
    return result


def _add(
    result: Sample,
    how: Dialect,
    module: str,
    stem: str,
    shape: Shape,
    rank: int,
    alphas: Alphas,
    dtype: torch.dtype,
    swapped: bool,
) -> None:
    alpha = alphas(len(result.meaning), rank)
    down = random(f"{module}.down", rank, *shape[1:]).to(dtype)
    up = random(f"{module}.up", shape[0], rank, *(1 for _ in shape[2:])).to(dtype)
    result.tensors[stem + how.A], result.tensors[stem + how.B] = down, up
    if alpha is not None:
        result.tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
        alpha = float(result.tensors[f"{stem}.alpha"])
    delta = (1.0 if alpha is None else alpha / rank) * up.flatten(1).double() @ down.flatten(1).double()
    result.meaning[module] = torch.cat(delta.chunk(2)[::-1]) if swapped else delta
    result.stems[module] = stem


def fits(family: str, dialect: str) -> bool:
    """Whether files of a family are written in a dialect at all."""
    unet = family in ("sd15", "sdxl")
    if dialect in ("lora_transformer_", "lycoris_"):
        return not unet
    if dialect == "without a prefix":
        return family in ("qwen_image", "flux", "wan")
    return dialect != "component, older" or unet


CASES = [(family, dialect) for family in FAMILIES for dialect in DIALECTS if fits(family, dialect)]
