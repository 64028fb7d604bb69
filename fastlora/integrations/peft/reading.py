"""Adapters of a live model as adapters of fastlora, on the model's own tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import BaseInfo, Extra, Scaling
from fastlora.core.dtypes import widest
from fastlora.core.updates import Update, sources
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.integrations.peft.experts import expert_updates
from fastlora.integrations.peft.live import (
    FROM_FILES,
    Host,
    config_of,
    host_of,
    ia3_layers,
    lora_layers,
    parameter_wrappers,
)

Scale = Literal["live", "config"]


class LiveFactors(NamedTuple):
    """``ΔW = scaling · B · A`` of one layer, on the parameters of the model; ``bias``: of ``lora_B``, or ``None``."""

    B: Tensor
    A: Tensor
    scaling: float
    is_embedding: bool
    bias: Tensor | None


def pool(model: nn.Module, adapters: Sequence[str] | None = None, scaling: Scale = "live") -> Pool:
    """The LoRA adapters of a live model as a pool, on the model's own tensors.

    Args:
        model: a ``PeftModel``, its tuner, or a module with a ``peft_config``.
        adapters: their names, in the order of the pool; all by default.
        scaling: ``"live"``: what each layer applies now, with weights that were given by ``set_scale`` or diffusers'
            ``set_adapters``; ``"config"``: ``lora_alpha / r``, or ``lora_alpha / √r`` of rsLoRA, alone.

    Returns:
        :class:`fastlora.Pool` with ``B [n, r]`` and ``A [r, m]`` of every adapted module, named by its path in the
        model. It holds views: while it is in use, the adapters must not be trained or deleted.

    Raises:
        InputError: an adapter that the model does not have, factors on several devices or on none, another
            ``scaling``.
        UnsupportedAdapter: an adapter that is not ``s·B·A``: DoRA, an initialisation that changed the base model,
            trained biases of the model, variants of LoRA, grouped convolutions; (IA)³, of which :func:`read` makes an
            adapter.

    Cost: no factor is copied; where scalings are tensors of a GPU, one read of each.
    """
    host = host_of(model)
    names = list(host.configs) if adapters is None else _listed(adapters)
    if not names:
        raise InputError("the model has no adapters; load one, or give the adapted model itself")
    return Pool([read_from(host, name, scaling) for name in names], align=False)


def read(model: nn.Module, name: str, scaling: Scale = "live") -> Adapter | IA3:
    """One adapter of a live model, LoRA or (IA)³, on the model's own tensors.

    Args:
        model: a ``PeftModel``, its tuner, or a module with a ``peft_config``.
        name: of the adapter.
        scaling: as :func:`pool` takes it.

    Returns:
        :class:`fastlora.Adapter` or :class:`fastlora.IA3`, which can be saved: ``read(model, "mix").save("mix")``.

    Raises:
        InputError: an adapter that the model does not have, factors on several devices or on none.
        UnsupportedAdapter: what :func:`pool` refuses.

    Cost: no factor is copied.
    """
    return read_from(host_of(model), name, scaling)


def read_from(host: Host, name: str, scaling: Scale = "live") -> Adapter | IA3:
    """:func:`read` from the parts of a model."""
    if scaling not in ("live", "config"):
        raise InputError(
            f"scaling={scaling!r} does not exist: use 'live' (what applies now) or 'config' (lora_alpha/r)"
        )
    config = config_of(host, name)
    base = BaseInfo(
        model=config.base_model_name_or_path,
        revision=config.revision,
        task_type=str(getattr(config.task_type, "value", config.task_type)) if config.task_type else None,
        fan_in_fan_out=bool(config.fan_in_fan_out),
        modules_to_save=tuple(config.modules_to_save or ()),
    )
    values = _replaced_parameters(host, name)
    if str(getattr(config.peft_type, "value", config.peft_type)) == "IA3":
        return _read_ia3(host, name, base, values)
    layers = live_factors(host, name, scaling)
    experts = _expert_updates(host, name, scaling)
    if not layers and not experts:
        raise InputError(f"adapter {name!r} has no layers in the model; it was deleted in part, or its load failed")
    _require_one_device(name, [*layers.items(), *experts.items()])
    adapter = Adapter(name, experts)
    if layers:
        stored = {path: (f.B, f.A, f.scaling) for path, f in layers.items()}
        embeddings = [path for path, f in layers.items() if f.is_embedding]
        adapter = Adapter.from_tensors(stored, name=name, embeddings=embeddings)
    updates = dict(adapter.updates) | experts
    dtype = widest(d for u in updates.values() for d in u.dtypes())
    shifts = {f"{p}.bias": Extra("delta", f.bias.float() * f.scaling) for p, f in layers.items() if f.bias is not None}
    return replace(adapter, updates=updates, base=base, extras=values | shifts, dtype=dtype)


def live_factors(host: Host, name: str, scaling: Scale = "live") -> dict[str, LiveFactors]:
    """``{path: factors}`` of the modules of a LoRA adapter, in the shapes that peft has; those of parameters
    (``target_parameters``) are left out. Raises for what cannot be computed with."""
    return {path: _factors(path, layer, name, scaling) for path, layer in lora_layers(host, name)}


def _expert_updates(host: Host, name: str, scaling: Scale) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for path, wrapper in parameter_wrappers(host, name):
        found = _factors(path, wrapper, name, scaling)
        updates |= expert_updates(path, wrapper, found.B, found.A, found.scaling)
    return updates


def _factors(path: str, layer: Any, name: str, scaling: Scale) -> LiveFactors:
    is_embedding = name in layer.lora_embedding_A
    bias = None
    if is_embedding:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        bias = getattr(layer.lora_B[name], "bias", None)
    for tensor in (A, B):
        if tensor.is_meta or type(tensor.data) not in (Tensor, nn.Parameter):
            raise InputError(
                f"module {path!r} of adapter {name!r} has no memory of its own here ({type(tensor.data).__name__} on "
                f"{tensor.device}): it is offloaded or sharded; load the model on one device"
            )
    if A.dim() > 2 and A.shape[0] != B.shape[1]:
        raise UnsupportedAdapter(
            f"module {path!r} of adapter {name!r} is a grouped convolution, whose update is not B·A; {FROM_FILES}"
        )
    factor = float(layer.scaling[name])
    if scaling == "config":
        rank = layer.r[name]
        factor = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
    return LiveFactors(B.detach(), A.detach(), factor, is_embedding, None if bias is None else bias.detach())


def _require_one_device(name: str, parts: Sequence[tuple[str, LiveFactors | Update]]) -> None:
    places: dict[Any, str] = {}
    for path, part in parts:
        stored = sources([part]) if isinstance(part, Update) else (part.B, part.A)
        places |= {tensor.device: path for tensor in stored}
    if len(places) > 1:
        where = ", ".join(f"{path!r} on {device}" for device, path in places.items())
        raise InputError(
            f"adapter {name!r} is on different devices ({where}); move the model to one, or save the adapters and "
            "merge the files"
        )


def _read_ia3(host: Host, name: str, base: BaseInfo, values: dict[str, Extra]) -> IA3:
    vectors = {
        path: Scaling(layer.ia3_l[name].detach(), bool(layer.is_feedforward)) for path, layer in ia3_layers(host, name)
    }
    if not vectors:
        raise InputError(f"adapter {name!r} has no layers in the model; it was deleted in part, or its load failed")
    places = {s.vector.device: path for path, s in vectors.items()}
    if len(places) > 1 or torch.device("meta") in places:
        where = ", ".join(f"{path!r} on {device}" for device, path in places.items())
        raise InputError(f"adapter {name!r} is on different devices or on none ({where}); move the model to one")
    return IA3(name, vectors, base=base, extras=values, dtype=widest(s.vector.dtype for s in vectors.values()))


def _replaced_parameters(host: Host, name: str) -> dict[str, Extra]:
    """The parameters of modules that the adapter keeps whole (``modules_to_save``)."""
    values: dict[str, Extra] = {}
    for path, wrapper in host.modules:
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and name in getattr(wrapper, "modules_to_save", {}):
            tensors = wrapper.modules_to_save[name].named_parameters()
            values |= {f"{path}.{key}": Extra("value", tensor.detach()) for key, tensor in tensors}
    return values


def _listed(adapters: Sequence[str]) -> list[str]:
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
        raise InputError(f"adapters needs a list of names, not {adapters!r}")
    return list(adapters)
