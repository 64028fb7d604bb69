"""Which stored tensors change, and by what: every edit is known before any number of the base model is read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.checkpoints.base import Base, matrix_shape
from fastlora.checkpoints.edits import Added, Edit, LowRank, Merged, Pair, Replaced, Rescaled, Stretched, pair_of
from fastlora.checkpoints.targets import Place, Targets, lengths, quantised
from fastlora.checkpoints.ties import repeated, same_products, same_tensors
from fastlora.core.data import AdapterData, DeltaData, DoraData, Extra, Ia3Data, LoraData, Magnitude, Scaling
from fastlora.core.updates import Update
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.merging.forms.full_rank import FullRank

BIAS = ".bias"


@dataclass(eq=False)
class Plan:
    """``edits {tensor: edits}``; ``shapes``: rows and columns of these tensors as matrices. ``notes``: what a user
    should know, in sentences."""

    edits: dict[str, list[Edit]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: str, shape: tuple[int, int], edit: Edit) -> None:
        """Puts an edit on the list of a tensor."""
        self.shapes[tensor] = shape
        self.edits.setdefault(tensor, []).append(edit)


def planned(base: Base, weighted: Sequence[tuple[AdapterData, float]]) -> Plan:
    """The plan of adapters with their weights on a base model.

    Raises :class:`InputError` for modules that the model does not have, shapes that differ, quantised weights, matrices
    that the model ties and an adapter treats apart; :class:`UnsupportedAdapter` for another kind.
    """
    targets, plan = Targets(base), Plan()
    # What has factors comes first: it says how experts lie in a matrix.
    for element, weight in sorted(weighted, key=lambda item: not isinstance(item[0], LoraData | DoraData)):
        if isinstance(element, LoraData | DoraData):
            _add_updates(plan, targets, element, weight)
        elif isinstance(element, Ia3Data):
            _add_vectors(plan, targets, element, weight)
        elif isinstance(element, DeltaData):
            _add_deltas(plan, targets, element, weight)
        else:
            raise UnsupportedAdapter(f"apply: {element.name!r} is neither an adapter nor a task vector")
        plan.notes += element.notes
    if not plan.edits:
        raise InputError("apply: nothing changes; the adapters hold no update that is not zero")
    return plan


def _add_updates(plan: Plan, targets: Targets, element: LoraData | DoraData, weight: float) -> None:
    names = names_of(targets, element)
    magnitudes: Mapping[str, Magnitude] = element.magnitudes if isinstance(element, DoraData) else {}
    again = _repeated(targets, element, names, magnitudes)
    shapes = {names[owner_of(m, u)]: u.shape for m, u in element.updates.items()}
    for module, update in element.updates.items():
        magnitude, name = magnitudes.get(module), names[owner_of(module, update)]
        if name in again:
            continue
        for place in targets.places(element.name, name, update, shapes):
            edit = _low_rank(element.name, module, update, place, weight, magnitude)
            if edit is not None:
                plan.add(place.tensor, shape_of(targets.base, place.tensor, update), edit)
    for name, extra in element.extras.items():
        if names[name] not in again:
            _add_extra(plan, targets, element.name, names[name], extra, weight)


def planned_merge(base: Base, merged: FullRank) -> Plan:
    """The plan of what a method on elements makes of a pool; it raises what :func:`planned` does."""
    targets, plan, record = Targets(base), Plan(), merged.record
    names = names_of(targets, record)
    repeated(targets, record.name, set(names.values()), lambda *_: False)
    shapes = {names[owner_of(m, u)]: u.shape for m, u in record.updates.items()}
    for module, update in record.updates.items():
        for place in targets.places(record.name, names[owner_of(module, update)], update, shapes):
            (first, last), (n, m) = place.rows, update.shape
            height, width = (m, last - first) if place.turned else (last - first, m)
            edit = Merged(
                at=place.at, height=height, left=place.left, width=width, weight=1.0, of=merged, module=module,
                shape=(n, m), rows=place.rows, turned=place.turned,
            )  # fmt: skip
            plan.add(place.tensor, shape_of(base, place.tensor, update), edit)
    for name, extra in record.extras.items():
        _add_extra(plan, targets, record.name, names[name], extra, 1.0)
    plan.notes += [*merged.pool.notices, *record.notes]
    return plan


def owner_of(module: str, update: Update) -> str:
    """The module whose name is looked for: that of all experts, of an expert."""
    return update.layout.container if update.layout.kind == "expert" else module


def names_of(targets: Targets, element: LoraData | DoraData) -> dict[str, str]:
    """The names of an adapter's modules and parameters in the model."""
    wanted: dict[str, Hashable] = {owner_of(m, u): _signature(u) for m, u in element.updates.items()}
    wanted |= {name: lengths(_matrix(extra.tensor).shape) for name, extra in element.extras.items()}
    return targets.names(element.name, wanted)


def _repeated(
    targets: Targets, element: LoraData | DoraData, names: Mapping[str, str], magnitudes: Mapping[str, Magnitude]
) -> set[str]:
    """What an adapter changes in the same way as what it is tied to."""
    updates = {names[m]: u for m, u in element.updates.items() if m in names}
    tensors = {names[name]: extra.tensor for name, extra in element.extras.items()}
    rescaled = {names[m] for m in magnitudes if m in names}

    def alike(first: str, second: str) -> bool:
        if first in tensors and second in tensors:
            return same_tensors(tensors)(first, second)
        if first not in updates or second not in updates or rescaled & {first, second}:
            return False
        pairs = [pair_of(updates[n], turned=updates[n].layout.kind == "embedding") for n in (first, second)]
        one, other = pairs
        return one is other if one is None or other is None else same_products(one, other)

    return repeated(targets, element.name, {*updates, *tensors}, alike)


def _low_rank(
    label: str, module: str, update: Update, place: Place, weight: float, magnitude: Magnitude | None
) -> Edit | None:
    pair = pair_of(update, turned=place.turned)
    n, m = update.shape
    if pair is None:
        if magnitude is None:
            return None
        height, width = (m, n) if place.turned else (n, m)
        pair = Pair(torch.zeros(height, 0), torch.zeros(0, width), 1.0, False)
    first, last = place.rows
    if place.turned:
        pair, height, width = Pair(pair.left, pair.right[:, first:last], pair.scale, pair.wide), m, last - first
    else:
        pair, height, width = Pair(pair.left[first:last], pair.right, pair.scale, pair.wide), last - first, m
    block = {"at": place.at, "height": height, "left": place.left, "width": width, "weight": weight}
    if magnitude is None:
        return LowRank(**block, pair=pair)  # type: ignore[arg-type]
    of_outputs = magnitude.axis == "out"
    vector, group = magnitude.vector.double().flatten(), 1
    if of_outputs:
        whole = first == 0 and last == n
        if len(vector) != n or not (whole or not place.turned):
            raise InputError(f"adapter {label!r}: {len(vector)} magnitudes of {module}, which has {n} outputs")
        vector = vector[first:last]
    elif m % max(1, len(vector)) or (first, last) != (0, n):
        raise InputError(f"adapter {label!r}: {len(vector)} magnitudes of {module} do not fit its {m} inputs")
    else:
        group = m // len(vector)
    by_columns = of_outputs == place.turned
    if not by_columns and group > 1:
        raise InputError(f"adapter {label!r}: magnitudes of input channels of {module}, which is stored transposed")
    columns = width // group if by_columns else 0
    squares = torch.zeros(columns, dtype=torch.float64)
    return Rescaled(**block, pair=pair, magnitude=vector, by_columns=by_columns, group=group, squares=squares)  # type: ignore[arg-type]


def _add_extra(plan: Plan, targets: Targets, label: str, name: str, extra: Extra, weight: float) -> None:
    base = targets.base
    stored = targets.stored(name)
    if stored is None or base.tensors[stored].shape != tuple(extra.tensor.shape):
        there = "no such parameter" if stored is None else f"{list(base.tensors[stored].shape)}"
        raise InputError(
            f"adapter {label!r} brings {name} {list(extra.tensor.shape)}, and {base.root} has {there}; resize the "
            "model first, or leave such parameters out with --drop-extras"
        )
    refusal = base.refusal(stored)
    if refusal is not None:
        raise quantised(base, stored, refusal)
    values = _matrix(extra.tensor.cpu())
    rows, columns = plan.shapes.get(stored, (values.shape[0], values.shape[1]))
    values = values.reshape(rows, columns)
    kind = Added if extra.kind == "delta" else Replaced
    edit = kind(at=0, height=rows, left=0, width=columns, weight=weight, values=values)
    plan.add(stored, (rows, columns), edit)
    if extra.kind == "value":
        how = "replaced by" if weight == 1.0 else f"moved by {weight:g} of the way to"
        plan.notes.append(f"{stored} is {how} the one that adapter {label!r} was saved with")


def _add_vectors(plan: Plan, targets: Targets, element: Ia3Data, weight: float) -> None:
    base = targets.base
    wanted: dict[str, Hashable] = {m: _signature_of_vector(targets, m, s) for m, s in element.vectors.items()}
    wanted |= {name: lengths(_matrix(extra.tensor).shape) for name, extra in element.extras.items()}
    names = targets.names(element.name, wanted)
    repeated(targets, element.name, set(names.values()), lambda *_: False)
    for module, scaling in element.vectors.items():
        name = targets.stored(names[module])
        if name is None:
            raise InputError(f"adapter {element.name!r} scales {module}, which {base.root} has in parts or fused; it "
                             "can be applied to a model whose modules have its names")  # fmt: skip
        refusal = base.refusal(name)
        if refusal is not None:
            raise quantised(base, name, refusal)
        rows, columns = matrix_shape(base.tensors[name])
        vector, by_columns = scaling.vector.double().flatten(), scaling.feedforward != targets.is_turned(name)
        length = columns if by_columns else rows
        if not len(vector) or length % len(vector) or (length != len(vector) and not by_columns):
            raise InputError(f"adapter {element.name!r}: {len(vector)} factors for {name} {[rows, columns]}")
        vector = vector.repeat_interleave(length // len(vector))
        block = {"at": 0, "height": rows, "left": 0, "width": columns, "weight": weight}
        plan.add(name, (rows, columns), Stretched(**block, vector=vector, by_columns=by_columns))  # type: ignore[arg-type]
        bias = names[module] + BIAS
        if not scaling.feedforward and bias in base.tensors:
            block = {"at": 0, "height": len(vector), "left": 0, "width": 1, "weight": weight}
            edit = Stretched(**block, vector=vector, by_columns=False)  # type: ignore[arg-type]
            plan.add(bias, (len(vector), 1), edit)
    for parameter, extra in element.extras.items():
        _add_extra(plan, targets, element.name, names[parameter], extra, weight)


def _add_deltas(plan: Plan, targets: Targets, element: DeltaData, weight: float) -> None:
    """The change of every parameter by a fine-tune, and what it has in place of others."""
    given = {**element.deltas, **element.values}
    names = targets.names(element.name, {n: lengths(_matrix(x).shape) for n, x in given.items()})
    tensors = {names[n]: x for n, x in given.items()}
    again = repeated(targets, element.name, tensors, same_tensors(tensors), whole=True)
    for name, values in given.items():
        if names[name] not in again:
            extra = Extra("delta" if name in element.deltas else "value", values)
            _add_extra(plan, targets, element.name, names[name], extra, weight)


def _signature(update: Update) -> Hashable:
    if update.layout.kind == "expert":
        return update.layout.experts, lengths(update.shape)
    return lengths(update.shape)


def _signature_of_vector(targets: Targets, module: str, scaling: Scaling) -> Hashable:
    stored = targets.stored(module)
    return lengths(matrix_shape(targets.base.tensors[stored])) if stored else lengths(scaling.shape)


def shape_of(base: Base, name: str, update: Update) -> tuple[int, int]:
    """As a matrix: experts lie one below the other, the kernel of a convolution within its rows."""
    tensor = base.tensors[name]
    if len(tensor.shape) == 3 and update.layout.kind != "conv":
        return tensor.shape[0] * tensor.shape[1], tensor.shape[2]
    return matrix_shape(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor) if tensor.dim() else 1, -1)
