"""Models of transformers that loaded adapters by ``model.load_adapter``, without a ``PeftModel``.

The functions of :mod:`fastlora.integrations.peft` take such a model as it is. Here are the few verbs of transformers'
own that some of its versions refuse to run beside the newest peft (5.24 asks for peft 0.22): they do the same by
peft's public functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.errors import InputError
from fastlora.runtime import packages

packages.require("transformers")

from peft import functional  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from fastlora.integrations.peft import (  # noqa: E402
    add_weighted_adapter,
    decompose_adapters,
    pool,
    read,
    swap,
    write,
)

__all__ = [
    "active_adapters",
    "add_weighted_adapter",
    "decompose_adapters",
    "delete_adapter",
    "pool",
    "read",
    "set_adapter",
    "swap",
    "write",
]


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes one adapter or several the active ones, whose updates add up; frozen.

    Args:
        model: a model with a ``peft_config``.
        names: of its adapters.

    Raises:
        InputError: a name that the model does not have.

    Cost: none; no tensor is read.
    """
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        _require(model, name)
    functional.set_adapter(model, listed, inference_mode=True)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active, in order; empty where they are disabled. Reads no tensor."""
    names: dict[str, None] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
            names |= dict.fromkeys(layer.active_adapters)
    return list(names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of a model.

    Args:
        model: a model with a ``peft_config``.
        name: of the adapter.

    Raises:
        InputError: a name that the model does not have.

    Cost: its memory is given back.
    """
    _require(model, name)
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    kind = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
    functional.delete_adapter(model, adapter_name=name, prefix="ia3_" if kind == "IA3" else "lora_")
    del configs[name]
    if not configs:
        del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _require(model: nn.Module, name: str) -> None:
    configs: Any = getattr(model, "peft_config", {})
    if name not in configs:
        has = f"it has {', '.join(configs)}" if configs else "it has none"
        raise InputError(f"the model has no adapter {name!r}; {has}")
