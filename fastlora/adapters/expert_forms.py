"""Adapters of one mixture-of-experts model that store its experts differently, brought to one form.

Older model code has linear layers for every expert (``experts.3.w1``), newer code one parameter for all of them
(``experts.gate_up_proj``); and PEFT laid such parameters out in two ways (:mod:`fastlora.core.experts`). The form is
that of newer code, which current PEFT loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.adapters.renaming import renamed
from fastlora.core.data import LoraData
from fastlora.core.experts import (
    DOWN,
    GATE_UP,
    Shape,
    both_shapes,
    compared,
    fused_shapes,
    laid_out,
    settled,
    unsettled,
)
from fastlora.core.fusing import Stored, stacked
from fastlora.core.updates import Layout, Update
from fastlora.errors import InputError

A = TypeVar("A", bound=LoraData)

NUMBERED = re.compile(r"(.*experts)\.(\d+)\.(\w+)")
"""A layer of one expert: where the experts are, its number, and what it is."""

GATE, UP, BACK = frozenset({"w1", "gate_proj"}), frozenset({"w3", "up_proj"}), frozenset({"w2", "down_proj"})
PARTS = {**dict.fromkeys(GATE, "gate"), **dict.fromkeys(UP, "up"), **dict.fromkeys(BACK, DOWN), GATE_UP: GATE_UP}
"""What a layer of an expert is of the parameters: ``gate_up_proj = [gate; up]``."""

SPELLINGS = (
    {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
"""What a layer of an expert is called in the other of two kinds of model code."""

IN_OUT = re.compile(r"gpt[-_]?oss|llama[-_]?4|\baria\b", re.IGNORECASE)
"""Models whose parameters are ``[experts, in, out]``, which PEFT always laid out in the same way."""
INTERLEAVED = re.compile(r"gpt[-_]?oss", re.IGNORECASE)
"""Models whose ``gate_up_proj`` has the rows of its two parts in turn."""


def with_one_expert_form(adapters: Sequence[A]) -> tuple[list[A], list[str]]:
    """The adapters with their experts in one form, and what was changed, in sentences.

    Raises :class:`InputError` where the forms cannot be brought together, or where nothing tells how.
    """
    result, notes = list(adapters), list[str]()
    if any(u.layout.kind == "expert" for a in result for u in a.updates.values()):
        result, notes = _with_one_layout(result)
        result, more = _all_fused(result)
        notes += more
    result, more = _with_one_spelling(result)
    return result, [*notes, *more]


# -- layouts ----------------------------------------------------------------------------------------------------------


def _with_one_layout(adapters: list[A]) -> tuple[list[A], list[str]]:
    orders = {unsettled(a.updates) for a in adapters if any(u.layout.experts > 1 for u in a.updates.values())}
    known = _known_shapes(adapters)
    if not known and {"older", "unsaid"} <= orders:
        known, adapters = _of_unsaid(adapters)
        orders = {unsettled(a.updates) for a in adapters}
    known = both_shapes(known)
    if not any(orders) or (len(orders) == 1 and not known):
        return adapters, []
    result, notes = [], []
    for adapter in adapters:
        # Experts of other names are compared with nothing, and stay as they are where all are of one layout.
        if unsettled(adapter.updates) is None or (len(orders) == 1 and not fused_shapes(adapter.updates)):
            result.append(adapter)
            continue
        turned = _lies_transposed(adapter, known, adapters)
        result.append(replace(adapter, updates=settled(adapter.updates, turned)))
        if turned:
            notes.append(
                f"adapter {adapter.name!r} has its experts in the layout of peft before 0.19: taken transposed"
            )
    return result, notes


def _of_unsaid(adapters: list[A]) -> tuple[dict[str, Shape], list[A]]:
    """What adapters that do not say who saved them tell beside those of an older peft: they are of the same layout, or,
    where theirs is the transpose, they have the shapes ``[out, in]``."""
    by_order = {order: fused_shapes(a.updates) for a in adapters if (order := unsettled(a.updates)) is not None}
    found = compared(by_order["unsaid"], by_order["older"])
    if found == {False}:
        return {}, [replace(a, updates=laid_out(a.updates, "older")) for a in adapters]
    return (by_order["unsaid"] if found == {True} else {}), adapters


def _known_shapes(adapters: Iterable[LoraData]) -> dict[str, Shape]:
    """The shapes of expert parameters ``[out, in]``, where some adapter tells."""
    shapes: dict[str, Shape] = {}
    for adapter in adapters:
        if unsettled(adapter.updates) is None:
            shapes = fused_shapes(adapter.updates) | shapes
        for module, update in adapter.updates.items():
            part = _part(module, update)
            if part in ("gate", "up"):
                shapes.setdefault(GATE_UP, (2 * update.shape[0], update.shape[1]))
            elif part in (DOWN, GATE_UP):
                shapes.setdefault(part, update.shape)
    return shapes


def _lies_transposed(adapter: LoraData, known: Mapping[str, Shape], adapters: Sequence[LoraData]) -> bool:
    """Whether an adapter that does not tell lies transposed, by the shapes that others have."""
    shapes, order = fused_shapes(adapter.updates), unsettled(adapter.updates)
    found = compared(shapes, known)
    if len(found) == 1:
        return found.pop()
    if any(n != m and parameter in known for parameter, (n, m) in shapes.items()):
        return False  # of another base model, which is told where they are combined
    if not found and order == "older":
        if any(IN_OUT.search(a.base.model or "") for a in adapters):
            return False
        # No model is known with [experts, in, out] and a square gate_up_proj; there are such with a square down_proj.
        if shapes.keys() == {GATE_UP} and shapes[GATE_UP][0] == shapes[GATE_UP][1]:
            return True
    others = ", ".join(repr(a.name) for a in adapters if a is not adapter)
    said = {"older": "was saved by peft before 0.19", "unsaid": "does not say by which peft it was saved"}
    found_shapes = ", ".join(f"{p} {list(s)}" for p, s in shapes.items()) or "experts of other names"
    out = 'write the version of peft that saved it into its adapter_config.json, such as "peft_version": "0.18.0"'
    if order == "older":
        out = (
            'if the model\'s parameter is [experts, in, out], write "peft_version": "0.19.0" into its '
            "adapter_config.json; else load it with peft 0.18 on its base model and merge it there"
        )
    raise InputError(
        f"adapter {adapter.name!r} {said[order or 'unsaid']}, which laid fused experts out in another way than peft "
        f"0.19 and later, as {others} may be, and its shapes ({found_shapes}) do not tell which; {out}"
    )


# -- experts one by one -----------------------------------------------------------------------------------------------


def _all_fused(adapters: list[A]) -> tuple[list[A], list[str]]:
    """Adapters with a pair of factors for each expert's layers, as those that have fused parameters."""
    containers = {u.layout.container: u for a in adapters for u in a.updates.values() if u.layout.experts > 1}
    fused = {c: u for c, u in containers.items() if c.rpartition(".")[2] in (GATE_UP, DOWN)}
    unknown = {_block(c.rpartition(".")[0])[0]: c for c in containers if c not in fused}
    if unknown:
        _refuse_unknown(adapters, unknown)
    if not fused:
        return adapters, []
    result, notes = [], []
    for adapter in adapters:
        layers = _layers(adapter)
        if layers:
            adapter, ranks = _fused(adapter, layers, fused)
            notes.append(
                f"adapter {adapter.name!r} has factors for every expert's own layers ({next(iter(layers))}, …), and "
                f"others have them for all experts together: it takes part as these ({', '.join(ranks)})"
            )
        result.append(adapter)
    return result, notes


def _refuse_unknown(adapters: Iterable[LoraData], containers: Mapping[str, str]) -> None:
    """Refuses layers of single experts beside fused parameters that say nothing of how these lie in them."""
    for adapter in adapters:
        for module in _layers(adapter):
            block = _block(module.rpartition(".")[0].rpartition(".")[0])[0]
            if block in containers:
                raise InputError(
                    f"adapter {adapter.name!r} has factors for single experts ({module}), and another adapter has "
                    f"{containers[block]} for all of them together: one weight in two forms, and how the first lies in "
                    "the second is not known; convert the adapters to one form with the code that trained them"
                )


def _part(module: str, update: Update) -> str | None:
    if "experts." not in module or update.layout.kind != "linear":
        return None
    numbered = NUMBERED.fullmatch(module)
    return None if numbered is None else PARTS.get(numbered[3])


def _layers(adapter: LoraData) -> dict[str, str]:
    """``{module: part}`` of the layers of single experts."""
    return {m: part for m, u in adapter.updates.items() if (part := _part(m, u)) is not None}


def _fused(adapter: A, layers: Mapping[str, str], fused: Mapping[str, Update]) -> tuple[A, list[str]]:
    _refuse_what_cannot_be_fused(adapter, layers, fused)
    containers = {c.rpartition(".")[0]: u.layout.experts for c, u in fused.items()}
    by_expert: dict[tuple[str, int], dict[str, Update]] = {}
    updates: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        if module not in layers:
            updates[module] = update
            continue
        numbered = NUMBERED.fullmatch(module)
        assert numbered is not None
        by_expert.setdefault((numbered[1], int(numbered[2])), {})[layers[module]] = update
    made: Stored = {}
    ranks: dict[str, set[int]] = {}
    for (owner, expert), parts in sorted(by_expert.items(), key=lambda item: item[0][1]):
        where, count = _counterpart(owner, containers)
        if expert >= count:
            raise InputError(
                f"adapter {adapter.name!r} has expert {expert} of {owner}, and {where} has {count} in the adapters "
                "with fused experts: these adapters are of different base models"
            )
        for parameter, update in _parameters(owner, expert, parts, made).items():
            container = f"{where}.{parameter}"
            layout = Layout("expert", container=container, expert=expert, experts=count)
            updates[f"{container}[{expert}]"] = replace(update, layout=layout)
            ranks.setdefault(parameter, set()).add(update.rank)
    told = [f"{parameter} of rank {max(found)}" for parameter, found in ranks.items()]
    return replace(adapter, updates=updates), told


def _with_one_spelling(adapters: list[A]) -> tuple[list[A], list[str]]:
    """Experts one by one, all under the names that the first adapter with such layers has."""
    layers = [_layers(a) for a in adapters]
    first = next((i for i, found in enumerate(layers) if found), None)
    if first is None or not any(layers[first + 1 :]):
        return adapters, []
    ends: dict[str, str] = {}
    owners: dict[str, int] = {}
    for module, part in layers[first].items():
        owner, _, end = module.rpartition(".")
        ends.setdefault(part, end)
        owners[owner.rpartition(".")[0]] = 1
    spelling = next((s for s in SPELLINGS if set(ends.values()) <= s.keys()), None)
    result, notes = list(adapters), []
    for i in range(first + 1, len(adapters)):
        names = {}
        for module in layers[i]:
            owner, _, end = module.rpartition(".")
            where, _, expert = owner.rpartition(".")
            new_end = next((s[end] for s in SPELLINGS if spelling is not None and end in s and s is not spelling), end)
            new = f"{_counterpart(where, owners)[0]}.{expert}.{new_end}"
            if new != module:
                names[module] = new
        if names:
            old, new = next(iter(names.items()))
            result[i] = renamed(adapters[i], names)
            notes.append(f"adapter {adapters[i].name!r}: {old}, … is taken for {new}, …: the same layers of experts")
    return result, notes


def _refuse_what_cannot_be_fused(adapter: LoraData, layers: Mapping[str, str], fused: Mapping[str, Update]) -> None:
    if any(u.layout.container in fused for u in adapter.updates.values()):
        raise InputError(
            f"adapter {adapter.name!r} has factors both for single experts ({next(iter(layers))}) and for all of them "
            f"together ({next(iter(fused))}), which no model has; leave out one of the two"
        )
    changed = next((p for p in adapter.extras if p.rpartition(".")[0] in layers), None)
    if changed is not None:
        raise InputError(
            f"adapter {adapter.name!r} also changes {changed}, beside factors that must be brought together with fused "
            "experts of other adapters; use `adapter.without_extras()` (`--drop-extras`) to leave such parameters out"
        )
    if INTERLEAVED.search(adapter.base.model or ""):
        raise InputError(
            f"adapter {adapter.name!r} has factors for single experts ({next(iter(layers))}) of {adapter.base.model}, "
            "whose fused gate_up_proj has the rows of gate and up in turn; bring the adapters to one form with the "
            "code that trained them"
        )


def _counterpart(owner: str, containers: Mapping[str, int]) -> tuple[str, int]:
    """Where the fused experts of a layer are, in the naming of the adapter, and how many there are."""
    if owner in containers:
        return owner, containers[owner]
    block, _ = _block(owner)
    blocks = {c: f".{_block(c)[0]}" for c in containers}
    here = [c for c, other in blocks.items() if other.endswith(f".{block}") or f".{block}".endswith(other)]
    like = next(iter(here or containers))
    return ".".join(part for part in (block, _block(like)[1]) if part), containers[like]


def _block(owner: str) -> tuple[str, str]:
    """``("model.layers.0", "mlp.experts")``."""
    parts = owner.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def _parameters(owner: str, expert: int, parts: Mapping[str, Update], made: Stored) -> dict[str, Update]:
    """The updates of the parameters of one expert: ``gate_up_proj = [gate; up]``, ``down_proj``."""
    result = {p: parts[p].baked() for p in (GATE_UP, DOWN) if p in parts}
    gate, up = parts.get("gate"), parts.get("up")
    shapes = {u.shape for u in (gate, up) if u is not None}
    if len(shapes) > 1 or (shapes and GATE_UP in parts):
        raise InputError(
            f"{owner}.{expert}: gate and up cannot be parts of one gate_up_proj (shapes {sorted(shapes)}); these "
            "adapters are of different base models"
        )
    if shapes:
        ((inner, _),) = shapes
        placed = [(start, u) for start, u in ((0, gate), (inner, up)) if u is not None]
        result[GATE_UP] = stacked(placed, 2 * inner, made)
    return result
