"""Weighted sums of updates and of what an adapter holds beside them, MATH section 4."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, Extra, Ia3Data, LoraData, joined_selection
from fastlora.core.factors import Factor, Term, concatenate
from fastlora.core.file_form import joined_form
from fastlora.core.updates import NO_NOISE, Update, joint_noise, with_rank_zero
from fastlora.errors import InputError

WithExtras = LoraData | Ia3Data
"""The kinds that may hold biases and replaced modules."""

SUM_TOLERANCE = 1e-9
"""Of sums of weights: decimals such as 0.1 have no exact float."""


def require_one_device(adapters: Sequence[LoraData]) -> None:
    """Refuses matrices that no kernel could read together."""
    placed = [a for a in adapters if a.place is not None]
    for first, other in itertools.pairwise(placed):
        if other.device != first.device:
            raise InputError(
                f"adapter {first.name!r} is on {first.device} and {other.name!r} on {other.device}; move one of them "
                "with `.to(…)`"
            )


def combine_updates(terms: Sequence[tuple[float, Update]], module: str) -> Update:
    """``Σ_i w_i ΔW_i`` of one module."""
    first = terms[0][1]
    n, m, layout = first.B.length, first.A.length, first.layout
    for _, u in terms:
        if u.B.length != n or u.A.length != m or u.layout is not layout:
            _require_alike(terms, module)
    return sum_updates(terms)


def _require_alike(terms: Sequence[tuple[float, Update]], module: str) -> None:
    """Refuses updates of different shapes or layouts."""
    first = terms[0][1]
    if any(u.shape != first.shape for _, u in terms):
        found = " and ".join(f"{n}×{m}" for n, m in sorted({u.shape for _, u in terms}))
        raise InputError(f"{module}: cannot add updates of shapes {found}: these adapters are of different base models")
    if any(u.layout is not first.layout and u.layout != first.layout for _, u in terms):
        kinds = " and ".join(dict.fromkeys(u.layout.kind for _, u in terms))
        raise InputError(
            f"{module}: cannot add updates of different layouts ({kinds}): these adapters are of different base models"
        )


def sum_updates(terms: Sequence[tuple[float, Update]]) -> Update:
    """:func:`combine_updates` of updates that are known to be of one module, as those of a pool are."""
    first = terms[0][1]
    kept = _without_cancelled([(w, u) for w, u in terms if w != 0.0])
    if not kept:
        return with_rank_zero(first)
    if len(kept) == 1:
        weight, update = kept[0]
        return replace(update, scaling=update.scaling * weight, noise=update.noise.scaled(weight))
    found = _stored_side_by_side(kept)
    if found is not None:
        return found
    left = concatenate([u.B.scaled(u.scaling * w) for w, u in kept])
    left, right = _without_cancelled_blocks(left, concatenate([u.A for _, u in kept]))
    noisy = any(u.noise is not NO_NOISE for _, u in kept)
    noise = joint_noise([u.noise.scaled(w) for w, u in kept]) if noisy else NO_NOISE
    return Update(left, right, 1.0, kept[0][1].layout, noise) if left.rank else with_rank_zero(first)


def _stored_side_by_side(terms: Sequence[tuple[float, Update]]) -> Update | None:
    """The sum of updates whose factors are different stored matrices, as most are; ``None`` for others."""
    left: list[Term] = []
    right: list[Term] = []
    at = 0
    for weight, update in terms:
        B, A = update.B.stored, update.A.stored
        if B is None or A is None or update.noise is not NO_NOISE:
            return None
        left.append(Term(B, None, at, update.scaling * weight))
        right.append(Term(A, None, at))
        at += update.B.rank
    if not at or len({id(t.source) for t in left}) < len(left):
        return None
    first = terms[0][1]
    B_sum = Factor.of_terms("B", first.B.length, at, tuple(left))
    return Update(B_sum, Factor.of_terms("A", first.A.length, at, tuple(right)), 1.0, first.layout)


# Relative to its terms, a sum of weights at or below it is zero: a few roundings of float64.
CANCELLED = 1e-15


def _without_cancelled(terms: Sequence[tuple[float, Update]]) -> Sequence[tuple[float, Update]]:
    """The terms but for those of one update whose weights add up to zero: ``a − a`` is empty, and not ``a`` twice with
    the rounding of their difference."""
    if len({id(u.B) for _, u in terms}) == len(terms):  # as in most sums
        return terms
    weights: dict[tuple[int, int], list[float]] = {}
    for weight, update in terms:
        weights.setdefault((id(update.B), id(update.A)), []).append(weight * update.scaling)
    cancelled = _cancelled(weights)
    return [(w, u) for w, u in terms if (id(u.B), id(u.A)) not in cancelled]


def _without_cancelled_blocks(B: Factor, A: Factor) -> tuple[Factor, Factor]:
    """The same for stored matrices side by side, ``Σ_b s_b B_b A_b``: of ``(a + b) − a`` the blocks of ``b`` are
    left."""
    if len({id(t.source) for t in B.terms}) == len(B.terms):  # as in most sums
        return B, A
    if B.joined is None or A.joined is None or [t.at for t in B.terms] != [t.at for t in A.terms]:
        return B, A
    blocks = list(zip(B.terms, A.terms, strict=True))
    weights: dict[tuple[int, int], list[float]] = {}
    for b, a in blocks:
        weights.setdefault((id(b.source), id(a.source)), []).append(b.scale * a.scale)
    cancelled = _cancelled(weights) if len(weights) < len(blocks) else set()
    if not cancelled:
        return B, A
    left, right, rank = [], [], 0
    for b, a in blocks:
        if (id(b.source), id(a.source)) not in cancelled:
            left.append(replace(b, at=rank))
            right.append(replace(a, at=rank))
            rank += b.width("B")
    return replace(B, rank=rank, terms=tuple(left)), replace(A, rank=rank, terms=tuple(right))


def _cancelled(weights: Mapping[tuple[int, int], Sequence[float]]) -> set[tuple[int, int]]:
    """The keys that are there several times and whose weights add up to zero."""
    several = {key: values for key, values in weights.items() if len(values) > 1}
    return {key for key, values in several.items() if abs(sum(values)) <= CANCELLED * sum(map(abs, values))}


def combine_extras(terms: Sequence[tuple[float, WithExtras]]) -> dict[str, Extra]:
    """Extras of a sum: known changes add up; a replaced value is kept where the sum leaves it as it is, else refused.

    With a value ``v`` that all adapters have alike, ``base + Σ_i w_i (v − base)`` is ``v`` where the weights add up to
    one, and the base model's own where they add up to zero, whatever the base model is.
    """
    changes: dict[str, Tensor] = {}
    owners: dict[str, list[tuple[float, WithExtras]]] = {}
    for weight, adapter in terms:
        for name, extra in adapter.extras.items():
            if extra.kind == "value":
                owners.setdefault(name, []).append((weight, adapter))
                continue
            part = weight * extra.tensor.double()
            changes[name] = changes[name] + part if name in changes else part
    values: dict[str, Extra] = {}
    for name, of_name in owners.items():
        value = _kept_value(name, of_name, terms)
        if value is not None and name in changes:  # both are known: what is replaced, and what is added to it
            values[name] = Extra("value", (value.tensor.double() + changes.pop(name)).to(value.tensor.dtype))
        elif value is not None:
            values[name] = value
    return values | {name: Extra("delta", t.float()) for name, t in changes.items()}


def _kept_value(
    name: str, owners: Sequence[tuple[float, WithExtras]], terms: Sequence[tuple[float, WithExtras]]
) -> Extra | None:
    """The value that a sum has for the parameter ``name``; ``None`` for that of the base model."""
    first = owners[0][1].extras[name]
    if is_base_copy(name, first, terms):
        return first
    counted = [(w, a) for w, a in owners if w != 0.0]
    if not counted:
        return None
    value = counted[0][1].extras[name]
    lacking = next((a.name for w, a in terms if w != 0.0 and name not in a.extras), None)
    if all(_equal(a.extras[name].tensor, value.tensor) for _, a in counted):
        total = math.fsum(w for w, _ in counted)
        if lacking is None and math.isclose(total, 1.0, rel_tol=SUM_TOLERANCE):
            return value
        if abs(total) <= SUM_TOLERANCE * math.fsum(abs(w) for w, _ in counted):
            return None
        found = f"here they add up to {total:g}" if lacking is None else f"here {lacking!r} has none"
    else:
        found = f"here {counted[0][1].name!r} and others have different ones"
    raise InputError(
        f"adapter {counted[0][1].name!r} replaces {name} of its base model (modules_to_save or trained biases), and "
        "its change cannot be computed without the base model, so it cannot be scaled or added. It is kept where all "
        f"have the same and the weights add up to 1; {found}. Use `adapter.without_extras()` "
        "(`--drop-extras`) to leave such parameters out; or write each adapter into the base model (`fastlora apply`), "
        "and combine what `fl.task_vector(BASE, TUNED)` makes of them"
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two parameters are the same, bit for bit."""
    return first is second or (first.dtype == second.dtype and torch.equal(first, second))


def is_base_copy(name: str, extra: Extra, terms: Sequence[tuple[float, WithExtras]]) -> bool:
    """Whether a value is the base model's own: PEFT saves the weight of an embedding along with its LoRA update.

    Such a copy belongs to a module that has an update, and is the same in every adapter that holds it.
    """
    module = name.removesuffix(".weight")
    if module == name or not all(module in a for _, a in terms if name in a.extras):
        return False
    return all(_equal(a.extras[name].tensor, extra.tensor) for _, a in terms if name in a.extras)


def common_base(adapters: Sequence[WithExtras]) -> BaseInfo:
    """What a result says about its base model: the first adapter's word, where the others do not contradict."""
    first = adapters[0].base
    for adapter in adapters[1:]:
        if adapter.base.layer_replication != first.layer_replication:
            raise InputError(
                f"adapters {adapters[0].name!r} and {adapter.name!r} replicate layers differently, so equal "
                "module names mean different layers; they cannot be combined"
            )
    if all(a.base == first and a.base.form is first.form for a in adapters[1:]):
        return first
    saved = tuple(dict.fromkeys(m for a in adapters for m in a.base.modules_to_save))
    model = next((a.base.model for a in adapters if a.base.model), None)
    selection = joined_selection([a.base.selection for a in adapters])
    settled = frozenset().union(*(a.base.settled for a in adapters))
    form = joined_form([a.base.form for a in adapters])
    return replace(first, model=model, modules_to_save=saved, selection=selection, settled=settled, form=form)
