"""peft's own ``add_weighted_adapter`` replaced, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel

from fastlora.errors import InputError
from fastlora.integrations.peft.combining import PEFT_TYPES, add_weighted_adapter
from fastlora.merging.merge import methods

METHOD = "add_weighted_adapter"
_replaced: dict[type, tuple[Callable[..., None], Callable[..., None]]] = {}


def install() -> None:
    """Makes ``model.add_weighted_adapter`` of peft's LoRA and (IA)³ models ours, until :func:`uninstall`.

    A ``PeftModel`` forwards to it, so that code which calls it stays as it is. A ``combination_type`` that neither peft
    0.21 nor fastlora has goes to peft's own method. A second call changes nothing.

    Cost: none. It holds in the whole process.
    """
    for tuner in (LoraModel, IA3Model):
        if tuner not in _replaced:
            original = tuner.__dict__[METHOD]
            ours = _forwarding(original)
            setattr(tuner, METHOD, ours)
            _replaced[tuner] = original, ours


def uninstall() -> None:
    """Puts peft's own methods back. Without an :func:`install` before it, it changes nothing.

    Raises:
        InputError: another package replaced the method since; undo that first.
    """
    for tuner, (_, ours) in _replaced.items():
        if tuner.__dict__[METHOD] is not ours:
            raise InputError(f"{tuner.__name__}.{METHOD} was replaced again since `install()`; undo that first")
    for tuner in list(_replaced):
        setattr(tuner, METHOD, _replaced.pop(tuner)[0])


def _forwarding(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def method(self: Any, adapters: Any, weights: Any, adapter_name: str, *options: Any, **more: Any) -> None:
        kind = options[0] if options else more.get("combination_type", "svd")
        if kind in PEFT_TYPES or kind in methods():
            add_weighted_adapter(self, adapters, weights, adapter_name, *options, **more)
        else:
            original(self, adapters, weights, adapter_name, *options, **more)

    return method
