"""The components of a pipeline that hold LoRAs, and the weights that are asked for in each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.errors import InputError
from fastlora.integrations.peft.live import host_of

Blocks = Mapping[str, Any]
"""Weights by block, as diffusers' ``set_adapters`` takes them: ``{"down": 0.8, "up": {"block_0": 0.5}}``."""
ComponentWeight = float | Blocks
Weight = float | Mapping[str, ComponentWeight]
"""A number for an adapter, or ``{component: number or weights by block}``; components that are left out have 1."""


def loadable(pipe: object) -> dict[str, nn.Module]:
    """The components that can hold LoRAs, by the names that diffusers has for them."""
    names = getattr(pipe, "_lora_loadable_modules", None)
    if not isinstance(names, list | tuple):
        raise InputError(f"a pipeline of diffusers that loads LoRAs is needed, not {type(pipe).__name__}")
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def adapted(pipe: object) -> dict[str, nn.Module]:
    """The components that hold LoRAs."""
    found = {name: model for name, model in loadable(pipe).items() if host_of(model).configs}
    if not found:
        raise InputError("the pipeline has no LoRAs; load some with pipe.load_lora_weights(…, adapter_name=…)")
    return found


def names_in(model: nn.Module) -> list[str]:
    """The adapters of a component."""
    return list(host_of(model).configs)


def weights_by_component(pipe: object, weights: Mapping[str, Weight]) -> dict[str, dict[str, ComponentWeight]]:
    """``{component: {adapter: weight}}`` of the adapters that each component has, in the order of ``weights``.

    Raises :class:`InputError` for adapters that no component has, and for weights of components that do not have the
    adapter: what diffusers ignores with a warning would be another mix than was asked for.
    """
    parts = adapted(pipe)
    loaded = {name for model in parts.values() for name in names_in(model)}
    if not isinstance(weights, Mapping) or not weights:
        raise InputError(f"weights={weights!r}: give {{adapter: weight}}, of {', '.join(sorted(loaded))}")
    found: dict[str, dict[str, ComponentWeight]] = {}
    for name, weight in weights.items():
        if name not in loaded:
            raise InputError(f"the pipeline has no adapter {name!r}; it has {', '.join(sorted(loaded))}")
        own = [component for component, model in parts.items() if name in names_in(model)]
        given = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(own, weight)
        unknown = next((component for component in given if component not in own), None)
        if unknown is not None:
            raise InputError(
                f"weights[{name!r}] names {unknown!r}, where that adapter has nothing; it has {', '.join(own)}"
            )
        for component in own:
            chosen = given.get(component, 1.0)
            _check(name, chosen)
            found.setdefault(component, {})[name] = chosen
    return found


def _check(name: str, weight: object) -> None:
    if isinstance(weight, Mapping):
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"the weight of {name!r} is {weight!r}: it must be a finite number, or numbers by block")
