"""An adapter in the place of a loaded one: the same tensors with other numbers, so that nothing is compiled anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import require_updates
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.formats.peft.names import exact_pattern
from fastlora.integrations.peft.live import config_of, host_of, lora_layers
from fastlora.integrations.peft.writing import ReadyFactors, ready, require_finite_tensors


def swap(model: nn.Module, adapter: VectorSpace, slot: str) -> None:
    """Puts a LoRA adapter into the slot of a loaded one. Tensors, their shapes and their dtype stay; ranks are filled
    with zeros up to those of the slot, modules that the adapter lacks are zeros.

    peft's ``hotswap_adapter`` looks patterns up under the wrong name, leaves the configuration as it was, and clears
    other adapters whose keys hold the name of the slot. Here the scaling is inside the factors, the configuration and
    the layers of the slot say so, and other adapters are not touched.

    Args:
        model: a ``PeftModel``, its tuner, or a module with a ``peft_config``; compiled or not.
        adapter: whose modules are among those of the slot, of ranks up to theirs.
        slot: the name of the loaded adapter. It keeps that name, and stays active or not.

    Raises:
        InputError: no such slot, modules that it does not have, ranks above its own, a slot that is merged into the
            model, a number that overflows the dtype of the slot. The model is as it was.
        UnsupportedAdapter: a slot or an adapter that is not ``s·B·A``.

    Cost: one read of the adapter and one copy into the slot.
    """
    host = host_of(model)
    config = config_of(host, slot)
    layers = dict(lora_layers(host, slot))
    if config.peft_type == "LORA" and config.target_parameters:
        raise UnsupportedAdapter(
            f"slot {slot!r} adapts parameters (target_parameters), which cannot be swapped in place"
        )
    if not layers:
        raise InputError(f"adapter {slot!r} of the model is no LoRA adapter, so nothing can be swapped into it")
    merged = [path for path, layer in layers.items() if slot in layer.merged_adapters]
    if merged:
        raise InputError(f"slot {slot!r} is merged into the model; unmerge it first (`model.unmerge_adapter()`)")
    update = require_updates(adapter, "a slot")
    _require_fit(update, slot, layers)
    new = _at_dtype(update, layers, slot)
    with torch.no_grad():
        for path, layer in layers.items():
            pair = new.get(path)
            for place, tensor in zip(_places(layer, slot), pair or (None, None), strict=True):
                _overwrite(place, tensor)
            _reset(layer, slot)
    ranks = {path: layer.r[slot] for path, layer in layers.items()}
    top = max(ranks.values())
    patterns = {exact_pattern(path): rank for path, rank in ranks.items() if rank != top}
    config.r = config.lora_alpha = top
    config.rank_pattern, config.alpha_pattern, config.use_rslora = dict(patterns), dict(patterns), False


def _places(layer: Any, slot: str) -> tuple[Tensor, Tensor]:
    """``B`` and ``A`` of the slot, in peft's shapes."""
    if slot in layer.lora_embedding_A:
        return layer.lora_embedding_B[slot], layer.lora_embedding_A[slot]
    return layer.lora_B[slot].weight, layer.lora_A[slot].weight


def _require_fit(adapter: Adapter, slot: str, layers: dict[str, Any]) -> None:
    absent = [path for path, u in adapter.updates.items() if path not in layers and u.rank]
    if absent:
        raise InputError(
            f"adapter {adapter.name!r} adapts {absent[0]!r}, which slot {slot!r} does not have; make the slot of an "
            "adapter with all modules, or add it with `write`"
        )
    for path, update in adapter.updates.items():
        rank = _places(layers[path], slot)[1].shape[0] if path in layers else update.rank
        if update.rank > rank:
            raise InputError(
                f"module {path!r} of adapter {adapter.name!r} has rank {update.rank} and slot {slot!r} holds {rank}: "
                f"compress it first (`.compress({rank})`)"
            )


def _at_dtype(adapter: Adapter, layers: dict[str, Any], slot: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in the dtype of the slot, checked."""
    stored = {place.dtype for layer in layers.values() for place in _places(layer, slot)}
    kept = ready(adapter, stored.pop() if len(stored) == 1 and torch.float64 not in stored else torch.float32)
    assert isinstance(kept, ReadyFactors)
    if kept.shifts:
        raise InputError(f"adapter {adapter.name!r} changes biases (lora_bias), which a slot does not hold")
    for path, pair in kept.pairs.items():
        for place, tensor in zip(_places(layers[path], slot), pair, strict=True):
            if place.dim() != tensor.dim() or any(p < t for p, t in zip(place.shape, tensor.shape, strict=True)):
                raise InputError(
                    f"module {path!r} is {list(tensor.shape)} in adapter {adapter.name!r} and {list(place.shape)} in "
                    f"slot {slot!r}: they belong to different base models"
                )
    cast = {
        path: (B.to(_places(layers[path], slot)[0].dtype), A.to(_places(layers[path], slot)[1].dtype))
        for path, (B, A) in kept.pairs.items()
    }
    named = {f"{path}.lora_{side}": t for path, pair in cast.items() for side, t in zip("BA", pair, strict=True)}
    require_finite_tensors(adapter.name, named)
    return cast


def _overwrite(place: Tensor, tensor: Tensor | None) -> None:
    place.data.zero_()
    if tensor is not None:
        place.data[tuple(slice(size) for size in tensor.shape)].copy_(tensor)


def _reset(layer: Any, slot: str) -> None:
    """Scaling 1, in the layer's own form: a tensor where the model was prepared for compiling."""
    scaling = layer.scaling[slot]
    if isinstance(scaling, Tensor):
        scaling.fill_(1.0)
    else:
        layer.scaling[slot] = 1.0
    rank = _places(layer, slot)[1].shape[0]
    layer.r[slot] = layer.lora_alpha[slot] = rank
    layer.use_rslora[slot] = False
