"""What ComfyUI and the scripts of kohya make of a file, as dense definitions: names of weights, and

    W[rows] += alpha / rank · up · down

in float64. A reader is the list of names that it asks a file for. Nothing of the package is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from original_models import Model, Place, halves
from torch import Tensor

COMFY_FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
SCRIPTS_FACTORS = ((".lora_down.weight", ".lora_up.weight"),)


def flat(name: str) -> str:
    return name.replace(".", "_")


@dataclass
class Outcome:
    """``deltas``: by weight. ``lost``: the names of tensors that the reader did not ask for."""

    deltas: dict[str, Tensor] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


def applied(
    tensors: Mapping[str, Tensor], names: Mapping[str, Place], model: Model, factors: tuple[tuple[str, str], ...]
) -> Outcome:
    """The changes of a model by a file, of a reader that asks for these names."""
    outcome = Outcome(lost=set(tensors))
    for name, place in names.items():
        for down, up in factors:
            if name + down not in tensors:
                continue
            A, B = tensors[name + down].double().flatten(1), tensors[name + up].double().flatten(1)
            alpha = tensors.get(f"{name}.alpha")
            delta = (1.0 if alpha is None else float(alpha) / len(A)) * B @ A
            whole = outcome.deltas.setdefault(
                place.weight, torch.zeros(model.weights[place.weight], dtype=torch.float64)
            )
            whole[place.row : place.row + place.rows] += halves(delta) if place.swapped else delta
            outcome.lost -= {name + down, name + up, f"{name}.alpha"}
    return outcome


# ComfyUI

_HUNYUAN = {
    "_mod.linear": "_mod.lin", ".modulation.linear": ".modulation.lin", "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer", "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer", "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
}  # fmt: skip
"""How ComfyUI's model of HunyuanVideo is called where the original code's is called otherwise."""
_HUNYUAN_OLD = ("_mod.linear", ".modulation.linear", "_attn_qkv", "_attn_proj", "mlp.fc1", "mlp.fc2")
"""Which of the original names it also takes, dotted."""
_WITH_TABLES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sd3": (("transformer.", "base_model.model."), ("lora_transformer_", "lycoris_")),
    "flux": (("transformer.", ""), ("lora_transformer_", "lycoris_")),
    "flux2": (("transformer.", ""), ("lora_transformer_", "lycoris_")),
    "pixart": (("transformer.", "base_model.model."), ()),
    "auraflow": (("transformer.",), ()),
    "qwen_image": (("transformer.", ""), ("lycoris_",)),
    "hidream": (("transformer.",), ("lycoris_",)),
    "krea2": (("transformer.", "diffusion_model.", ""), ("lycoris_",)),
    "z_image": (("transformer.", "diffusion_model.", ""), ("lycoris_",)),
}
"""By family: the dotted and the flat prefixes before names of diffusers, of which ComfyUI has tables."""
_NOT_IN_TABLES = {
    "flux": r"distilled_guidance_layer",
    "flux2": r"time_guidance_embed|stream_modulation",
}
NO_MODEL = ("sana", "cogvideox", "cogview4")
"""Families that ComfyUI has no model of, or takes no names for."""
UNETS = ("sd15", "sdxl", "sdxl_refiner")
_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


def comfy(tensors: Mapping[str, Tensor], model: Model) -> Outcome:
    """What ComfyUI makes of a file."""
    return applied(tensors, dict(_comfy_names(model)), model, COMFY_FACTORS)


def _comfy_names(model: Model) -> Iterator[tuple[str, Place]]:
    for weight, (rows, _) in model.weights.items():
        if not weight.startswith("text_encoder") and model.family not in NO_MODEL:
            yield from _by_own_name(model.family, weight, Place(weight, 0, rows))
    for module, place in model.places.items():
        if module.startswith("text_encoder"):
            yield from _comfy_text(model, module, place)
        elif model.family in UNETS:
            yield from _comfy_unet(module, place)
        elif model.family in _WITH_TABLES and not re.search(_NOT_IN_TABLES.get(model.family, "$."), module):
            dotted, flats = _WITH_TABLES[model.family]
            yield from ((prefix + module, place) for prefix in dotted)
            yield from ((prefix + flat(module), place) for prefix in flats)


def _by_own_name(family: str, weight: str, whole: Place) -> Iterator[tuple[str, Place]]:
    """The weight's name in ComfyUI's model."""
    own = weight
    if family == "hunyuan_video":
        for theirs, name in _HUNYUAN.items():
            own = own.replace(theirs, name)
        old = own
        for theirs in _HUNYUAN_OLD:
            old = old.replace(_HUNYUAN[theirs], theirs)
        yield from ((prefix + old, whole) for prefix in ("transformer.", "diffusion_model."))
    yield f"lora_unet_{flat(own)}", whole
    yield f"diffusion_model.{own}", whole


def _comfy_unet(module: str, place: Place) -> Iterator[tuple[str, Place]]:
    """Names of diffusers: attention's projections dotted only as those of a processor."""
    yield from ((prefix + flat(module), place) for prefix in ("lora_unet_", "lycoris_"))
    dotted = (
        module.replace(".to_", ".processor.to_").removesuffix(".0")
        if ".to_out" in module
        else module.replace(".to_", ".processor.to_")
    )
    yield from ((prefix + dotted, place) for prefix in ("", "unet."))


def _comfy_text(model: Model, module: str, place: Place) -> Iterator[tuple[str, Place]]:
    component, _, path = module.partition(".")
    if path.startswith("encoder.block."):
        yield f"text_encoders.t5xxl.transformer.{path}", place
        yield f"lora_te3_{flat(path)}", place
        if model.family == "flux":
            yield f"lora_te2_{flat(path)}", place
        return
    number = 2 if component == "text_encoder_2" else 1
    yield f"text_encoders.{'clip_g' if number == 2 else 'clip_l'}.transformer.{path}", place
    if path == "text_projection":
        yield f"lora_te{number}_text_projection", place
    elif _CLIP_LAYER.fullmatch(path):
        yield f"lora_te{number}_{flat(path)}", place
        yield f"{component}.{path}", place
        if number == 1:
            yield f"lora_te_{flat(path)}", place


# The scripts of kohya

_TRAINED: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("sd15", "sdxl"), lambda m: re.search(r"attentions\.|resnets\.|samplers\.", m) is not None),
    "flux": lambda m: not m.startswith(("norm_out", "proj_out", "distilled")),
    "sd3": lambda m: True,
    "lumina2": lambda m: True,
    "cosmos": lambda m: True,
}
"""By family: whether their network has a module of diffusers."""
NEEDS_ALPHA = ("flux", "sd3", "lumina2", "cosmos")
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\..*|encoder\.block\..*")


def sd_scripts(tensors: Mapping[str, Tensor], model: Model) -> Outcome:
    """What the network that their scripts make from a file's weights does to a model. An alpha of 0 is a scale of 1;
    those of Flux, SD3, Lumina 2 and Anima fail where an alpha is missing."""
    names = dict(_scripts_names(model))
    if model.family in NEEDS_ALPHA:
        for name in names:
            if f"{name}.lora_down.weight" in tensors and f"{name}.alpha" not in tensors:
                raise KeyError(name)
    nonzero = {k: t for k, t in tensors.items() if not (k.endswith(".alpha") and not t.any())}
    outcome = applied(nonzero, names, model, SCRIPTS_FACTORS)
    return replace(outcome, lost=outcome.lost & tensors.keys())


def _scripts_names(model: Model) -> Iterator[tuple[str, Place]]:
    trained = _TRAINED[model.family]
    for module, place in model.places.items():
        component, _, path = module.partition(".")
        if component.startswith("text_encoder"):
            number = 3 if path.startswith("encoder.") else 2 if component.endswith("_2") else 1
            prefix = "lora_te_" if model.family in ("sd15", "lumina2") else f"lora_te{number}_"
            if _TEXT_LAYER.fullmatch(path):
                yield prefix + flat(path), place
        elif not trained(module):
            continue
        elif model.family == "sd15":
            yield f"lora_unet_{flat(module)}", place
        else:
            yield f"lora_unet_{flat(place.weight)}", Place(place.weight, 0, model.weights[place.weight][0])
