"""``fl.merge``: one adapter from many, by a method of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool, on_device
from fastlora.engine.checks import require_finite
from fastlora.errors import InputError, NonFiniteError
from fastlora.merging.registry import Method, all_methods, find_method
from fastlora.runtime.cpython import paused_collector


def merge(
    pool: Pool,
    weights: Mapping[str, float] | None = None,
    *,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    device: str | torch.device | None = None,
) -> Adapter:
    """One adapter from many: ``Σ_i w_i ΔW_i`` and the like; :func:`methods` lists what ``method`` accepts.

    ``weights=None`` counts every adapter with 1.0. Otherwise an adapter that is not named counts 0, which the result's
    ``notes`` say; an unknown name is an error.
    """
    chosen = find_method(method)
    counted, notes = full_weights(pool, weights)
    pool = on_device(pool, device)
    try:
        with paused_collector():
            merged = chosen(pool, counted, rank=rank, energy=energy)
    except NonFiniteError:
        require_finite(pool.adapters)  # names the adapter of the pool; the method only knows their sum
        raise InputError(f"the weighted sum overflows: lower the weights {counted}") from None
    return replace(merged, notes=(*merged.notes, *notes))


def full_weights(pool: Pool, weights: Mapping[str, float] | None) -> tuple[dict[str, float], list[str]]:
    """A finite weight for every adapter of the pool, and notices of what was left to 0."""
    if weights is None:
        return dict.fromkeys(pool.names, 1.0), []
    unknown = [n for n in weights if n not in pool.names]
    if unknown:
        raise InputError(
            f"weights name {', '.join(map(repr, unknown))}, which the pool does not have: {', '.join(pool.names)}"
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"weight of {name!r} is {weight!r}: it must be a finite number")
    missing = [n for n in pool.names if n not in weights]
    notes = [f"{name} has no weight and counts 0" for name in missing]
    return {n: float(weights.get(n, 0.0)) for n in pool.names}, notes


def methods() -> dict[str, Method]:
    """What ``method=`` accepts: name, summary, parameters and source of each."""
    return all_methods()
