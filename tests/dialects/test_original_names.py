"""Original names, fused rows and halves in another order against what diffusers makes of original checkpoints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import diffusers.loaders.single_file_utils as single
import pytest
import torch
from diffusers_models import BUILDS, modules
from torch import Tensor

from fastlora.dialects.families import families
from fastlora.dialects.family import Family

FAMILIES = families()
Checkpoint = dict[str, Tensor]


def marked(number: int, rows: int) -> Tensor:
    """A weight ``[rows, 1]`` in which every row of every module is another number."""
    return torch.arange(rows, dtype=torch.float64).add(number * 2**20).reshape(-1, 1)


def halves(weight: Tensor) -> Tensor:
    first, second = weight.chunk(2)
    return torch.cat([second, first])


def original_checkpoint(
    family: Family, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint:
    """The checkpoint of the original code that has these weights, by the names of the family."""
    found: Checkpoint = {}
    for path, weight in weights.items():
        named = family.original(path, (shapes[path][0], shapes[path][-1]))
        if named is not None:
            found[f"{named[0]}.weight"] = halves(weight) if named[1] else weight
            continue
        whole = family.whole(path)
        assert whole is not None, f"{path} has no original name"
        parts, named = family.parts(whole), family.original(whole)
        assert parts is not None and named is not None
        found[f"{named[0]}.weight"] = torch.cat([weights[part] for part in parts])
    return found


def with_biases(checkpoint: Checkpoint) -> Checkpoint:
    """With a bias of the same rows beside every weight: converters ask for all that a model has."""
    biases = {key.removesuffix("weight") + "bias": weight[:, 0] for key, weight in checkpoint.items()}
    return checkpoint | biases


NORM = re.compile(r"(query_norm|key_norm|norms\.\d+)\.(weight|bias)$")


def scales(checkpoint: Checkpoint) -> Checkpoint:
    """The original code of Flux calls the weights of norms scales, and has no biases there."""
    return {NORM.sub(r"\1.scale", k): v for k, v in checkpoint.items() if not NORM.search(k) or k.endswith("weight")}


RMS = re.compile(r"(qnorm|knorm|prenorm|postnorm|txtmlp\.0|last\.norm)\.weight$")


def rms(checkpoint: Checkpoint) -> Checkpoint:
    """The original code of Krea 2 calls the weights of norms scales."""
    return {RMS.sub(r"\1.scale", k): v for k, v in checkpoint.items() if not k.endswith("norm.bias")}


def dummies(*names: str) -> Checkpoint:
    return {name: torch.zeros(1, 1, 1) for name in names}


def of_unet(checkpoint: Checkpoint, model: str) -> Checkpoint:
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    if model in ("sdxl", "refiner"):
        config["addition_embed_type"] = "text_time"
    full = {f"model.diffusion_model.{k}": v for k, v in checkpoint.items()}
    return single.convert_ldm_unet_checkpoint(full, config)


Convert = Callable[[Checkpoint, str], Checkpoint]
CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(("sd15", "sd2", "sdxl", "refiner"), of_unet),
    "flux": lambda c, _: single.convert_flux_transformer_checkpoint_to_diffusers(scales(c)),
    "chroma": lambda c, _: single.convert_chroma_transformer_checkpoint_to_diffusers(scales(c)),
    "flux2": lambda c, _: single.convert_flux2_transformer_checkpoint_to_diffusers(scales(c)),
    "sd3": lambda c, _: single.convert_sd3_transformer_checkpoint_to_diffusers(c | dummies("pos_embed")),
    "wan": lambda c, _: single.convert_wan_transformer_to_diffusers(c),
    "wan_vace": lambda c, _: single.convert_wan_transformer_to_diffusers(c),
    "hunyuan_video": lambda c, _: single.convert_hunyuan_video_transformer_to_diffusers(c),
    "z_image": lambda c, _: single.convert_z_image_transformer_checkpoint_to_diffusers(c),
    "lumina2": lambda c, _: single.convert_lumina2_to_diffusers(c),
    "hidream": lambda c, _: single.convert_hidream_transformer_to_diffusers(c),
    "ltx_video": lambda c, _: single.convert_ltx_transformer_checkpoint_to_diffusers(c),
    "ltx2": lambda c, _: single.convert_ltx2_transformer_to_diffusers(c),
    "cosmos": lambda c, _: single.convert_cosmos_transformer_checkpoint_to_diffusers(c),
    "auraflow": lambda c, _: single.convert_auraflow_transformer_checkpoint_to_diffusers(
        c | dummies("register_tokens", "positional_encoding")
    ),
    "krea2": lambda c, _: single.convert_krea2_transformer_checkpoint_to_diffusers(rms(c)),
    "mochi48": lambda c, _: single.convert_mochi_transformer_checkpoint_to_diffusers(c | dummies("pos_frequencies")),
    "sana": lambda c, _: single.convert_sana_transformer_to_diffusers(
        c
        | dummies("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table")
        | {f"blocks.{i}.scale_shift_table": torch.zeros(1) for i in range(2)}
    ),
}

UNKNOWN = defaultdict(lambda: "(none)", sana=".norm_", ltx2="prompt_adaln")
"""Modules that diffusers' converter does not know, by a piece of their paths: of later versions of a model."""


@pytest.mark.parametrize("model", CONVERTERS)
def test_diffusers_finds_every_module_of_an_original_checkpoint(model: str) -> None:
    family = FAMILIES[BUILDS[model][0]]
    shapes = {path: shape for path, shape in modules(model).items() if UNKNOWN[model] not in path}
    weights = {path: marked(i, shape[0]) for i, (path, shape) in enumerate(shapes.items())}
    converted: dict[str, Any] = CONVERTERS[model](with_biases(original_checkpoint(family, weights, shapes)), model)
    for path, weight in weights.items():
        assert torch.equal(converted[f"{path}.weight"].reshape(-1, 1), weight), path
