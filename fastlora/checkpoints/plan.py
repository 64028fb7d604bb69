"""Which stored tensors change, and by what: every edit is known before any number of the base model is read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.checkpoints.base import Base, matrix_shape
from fastlora.checkpoints.edits import Added, Edit, LowRank, Pair, Replaced, Rescaled, Stretched, pair_of
from fastlora.checkpoints.targets import Place, Targets, lengths, quantised
from fastlora.core.data import DoraData, Extra, Ia3Data, LoraData, Magnitude, ModulesData, Scaling
from fastlora.core.updates import Update
from fastlora.errors import InputError, UnsupportedAdapter

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


def planned(base: Base, weighted: Sequence[tuple[ModulesData, float]]) -> Plan:
    """The plan of adapters with their weights on a base model.

    Raises :class:`InputError` for modules that the model does not have, shapes that differ, quantised weights, matrices
    that the model ties and an adapter treats apart; :class:`UnsupportedAdapter` for another kind.
    """
    targets, plan = Targets(base), Plan()
    for element, weight in weighted:
        if isinstance(element, LoraData | DoraData):
            _add_updates(plan, targets, element, weight)
        elif isinstance(element, Ia3Data):
            _add_vectors(plan, targets, element, weight)
        else:
            raise UnsupportedAdapter(f"apply: {element.name!r} is neither a LoRA, a DoRA nor an (IA)³ adapter")
        plan.notes += element.notes
    if not plan.edits:
        raise InputError("apply: nothing changes; the adapters hold no update that is not zero")
    return plan


def _add_updates(plan: Plan, targets: Targets, element: LoraData | DoraData, weight: float) -> None:
    own = {m: u.layout.container if u.layout.kind == "expert" else m for m, u in element.updates.items()}
    wanted: dict[str, Hashable] = {own[m]: _signature(u) for m, u in element.updates.items()}
    wanted |= {name: lengths(_matrix(extra.tensor).shape) for name, extra in element.extras.items()}
    names = targets.names(element.name, wanted)
    shapes = {names[own[m]]: u.shape for m, u in element.updates.items()}
    magnitudes: Mapping[str, Magnitude] = element.magnitudes if isinstance(element, DoraData) else {}
    _refuse_apart(targets, element.name, names.values())
    for module, update in element.updates.items():
        magnitude = magnitudes.get(module)
        for place in targets.places(element.name, names[own[module]], update, shapes):
            edit = _low_rank(element.name, module, update, place, weight, magnitude)
            if edit is not None:
                plan.add(place.tensor, _shape(targets.base, place.tensor, update), edit)
    for name, extra in element.extras.items():
        _add_extra(plan, targets, element.name, names[name], extra, weight)


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
    values = _matrix(extra.tensor)
    rows, columns = values.shape
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
    _refuse_apart(targets, element.name, names.values())
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


def _refuse_apart(targets: Targets, label: str, names: object) -> None:
    changed = set(names)  # type: ignore[call-overload]
    for group in targets.ties:
        members = {n.removesuffix(".weight") for n in group} | set(group)
        found = sorted(changed & members)
        if found:
            raise InputError(
                f"adapter {label!r} changes {', '.join(found)}, which {targets.base.root} ties to "
                f"{', '.join(n for n in group if n.removesuffix('.weight') not in found and n not in found)}: there is "
                "one matrix for both, and what was trained is a change of one. Untie the model first "
                "(`tie_word_embeddings=False`, both matrices saved), or leave the module out of the adapter"
            )


def _signature(update: Update) -> Hashable:
    if update.layout.kind == "expert":
        return update.layout.experts, lengths(update.shape)
    return lengths(update.shape)


def _signature_of_vector(targets: Targets, module: str, scaling: Scaling) -> Hashable:
    stored = targets.stored(module)
    return lengths(matrix_shape(targets.base.tensors[stored])) if stored else lengths(scaling.shape)


def _shape(base: Base, name: str, update: Update) -> tuple[int, int]:
    """As a matrix: experts lie one below the other, the kernel of a convolution within its rows."""
    tensor = base.tensors[name]
    if len(tensor.shape) == 3 and update.layout.kind != "conv":
        return tensor.shape[0] * tensor.shape[1], tensor.shape[2]
    return matrix_shape(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor) if tensor.dim() else 1, -1)
