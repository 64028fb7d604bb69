"""Weighted sums of updates and of what an adapter holds beside them, MATH section 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, Extra, Ia3Data, LoraData
from fastlora.core.factors import concatenate
from fastlora.core.updates import Update, with_rank_zero
from fastlora.errors import InputError

WithExtras = LoraData | Ia3Data
"""The kinds that may hold biases and replaced modules."""


def require_one_device(adapters: Sequence[LoraData]) -> None:
    """Refuses matrices that no kernel could read together."""
    first = adapters[0]
    for other in adapters[1:]:
        if other.device != first.device:
            raise InputError(
                f"adapter {first.name!r} is on {first.device} and {other.name!r} on {other.device}; move one of them "
                "with `.to(…)`"
            )


def combine_updates(terms: Sequence[tuple[float, Update]], module: str) -> Update:
    """``Σ_i w_i ΔW_i`` of one module."""
    first = terms[0][1]
    if any(u.shape != first.shape for _, u in terms):
        found = " and ".join(f"{n}×{m}" for n, m in sorted({u.shape for _, u in terms}))
        raise InputError(f"{module}: cannot add updates of shapes {found}: these adapters are of different base models")
    if any(u.layout is not first.layout and u.layout != first.layout for _, u in terms):
        kinds = " and ".join(dict.fromkeys(u.layout.kind for _, u in terms))
        raise InputError(
            f"{module}: cannot add updates of different layouts ({kinds}): these adapters are of different base models"
        )
    return sum_updates(terms)


def sum_updates(terms: Sequence[tuple[float, Update]]) -> Update:
    """:func:`combine_updates` of updates that are known to be of one module, as those of a pool are."""
    first = terms[0][1]
    kept = [(w, u) for w, u in terms if w != 0.0]
    if not kept:
        return with_rank_zero(first)
    if len(kept) == 1:
        weight, update = kept[0]
        return replace(update, scaling=update.scaling * weight, floor=update.floor * abs(weight))
    left = concatenate([u.B.scaled(u.scaling * w) for w, u in kept])
    floor = max([u.floor * abs(w) for w, u in kept])
    return Update(left, concatenate([u.A for _, u in kept]), 1.0, kept[0][1].layout, floor)


def combine_extras(terms: Sequence[tuple[float, WithExtras]]) -> dict[str, Extra]:
    """Extras of a sum: known deltas add up; a replaced value is kept where the sum leaves it as it is, else refused."""
    alone = len(terms) == 1 and terms[0][0] == 1.0
    total: dict[str, Tensor] = {}
    values: dict[str, Extra] = {}
    for weight, adapter in terms:
        for name, extra in adapter.extras.items():
            if extra.kind == "delta":
                part = weight * extra.tensor.double()
                total[name] = total[name] + part if name in total else part
            elif alone or is_base_copy(name, extra, terms):
                values[name] = extra
            elif weight != 0.0:
                raise InputError(
                    f"adapter {adapter.name!r} replaces {name} of its base model (modules_to_save or trained "
                    "biases), and its change cannot be computed without the base model, so it cannot be scaled or "
                    "added. Use `adapter.without_extras()` (`--drop-extras`) to leave such parameters out"
                )
    return values | {name: Extra("delta", t.float()) for name, t in total.items()}


def is_base_copy(name: str, extra: Extra, terms: Sequence[tuple[float, WithExtras]]) -> bool:
    """Whether a value is the base model's own: PEFT saves the weight of an embedding along with its LoRA update.

    Such a copy belongs to a module that has an update, and is the same in every adapter that holds it.
    """
    module = name.removesuffix(".weight")
    if module == name or not all(module in a for _, a in terms if name in a.extras):
        return False
    return all(torch.equal(a.extras[name].tensor, extra.tensor) for _, a in terms if name in a.extras)


def common_base(adapters: Sequence[WithExtras]) -> BaseInfo:
    """What a result says about its base model: the first adapter's word, where the others do not contradict."""
    first = adapters[0].base
    for adapter in adapters[1:]:
        if adapter.base.layer_replication != first.layer_replication:
            raise InputError(
                f"adapters {adapters[0].name!r} and {adapter.name!r} replicate layers differently, so equal "
                "module names mean different layers; they cannot be combined"
            )
    saved = tuple(dict.fromkeys(m for a in adapters for m in a.base.modules_to_save))
    model = next((a.base.model for a in adapters if a.base.model), None)
    return replace(first, model=model, modules_to_save=saved)
