"""A result of a merge, longer or shorter."""

from __future__ import annotations

from dataclasses import replace

from fastlora.adapters.lora import Adapter
from fastlora.errors import InputError
from fastlora.merging.by_module import times


def scaled(merged: Adapter, factor: float, who: str = "recipe: lambda") -> Adapter:
    """``factor`` times a result, and times what stands beside its updates. ``who`` asks for it."""
    if factor == 1.0:
        return merged
    for path, extra in merged.extras.items():
        if extra.kind != "delta":
            raise InputError(
                f"{who}={factor:g} cannot be given to {path}, which replaces a value of the base model; leave "
                "it out with --drop-extras (`adapter.without_extras()`)"
            )
    extras = {path: replace(extra, tensor=factor * extra.tensor) for path, extra in merged.extras.items()}
    updates = {m: times(u, factor) for m, u in merged.updates.items()}
    return replace(merged, updates=updates, extras=extras)
