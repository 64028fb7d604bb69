"""How fused parameters of experts are laid out.

``W [experts, out, in]`` or ``[experts, in, out]``: models differ. An update of them has ``B [out, r]`` and
``A [r, in]`` here. So it is in files that PEFT saved from 0.19 on; before, it took every parameter for
``[experts, in, out]``, so the updates of ``[experts, out, in]`` lie transposed. Shapes tell, except for squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fastlora.core.fusing import Stored, transposed
from fastlora.core.updates import Update

Shape = tuple[int, int]

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The parameters of gated experts: ``gate_up_proj [2·inner, hidden]``, ``down_proj [hidden, inner]``."""

HIDDEN_IN, HIDDEN_OUT = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"}), frozenset({"o_proj"})
"""Modules whose inputs, or outputs, have the width of the experts' inputs."""


def unsettled(updates: Mapping[str, Update]) -> str | None:
    """``older`` or ``unsaid`` where some experts may lie transposed (:class:`Layout`)."""
    return next((u.layout.order for u in updates.values() if u.layout.order != "out-in"), None)


def settled(updates: Mapping[str, Update], is_transposed: bool) -> dict[str, Update]:
    """The updates with all experts ``[out, in]``; those that may lie transposed do so if ``is_transposed``."""
    made: Stored = {}
    result = {}
    for module, update in updates.items():
        if update.layout.order != "out-in":
            update = replace(update, layout=replace(update.layout, order="out-in"))
            update = transposed(update, made) if is_transposed else update
        result[module] = update
    return result


def laid_out(updates: Mapping[str, Update], order: Literal["older", "unsaid"]) -> dict[str, Update]:
    """The updates with another word on the layout of those experts that may lie transposed."""
    return {
        m: u if u.layout.order == "out-in" else replace(u, layout=replace(u.layout, order=order))
        for m, u in updates.items()
    }


def fused_shapes(updates: Mapping[str, Update]) -> dict[str, Shape]:
    """``{gate_up_proj: shape, down_proj: shape}`` of fused experts, as they are stored."""
    found = {u.layout.container.rpartition(".")[2]: u.shape for u in updates.values() if u.layout.kind == "expert"}
    return {parameter: shape for parameter, shape in found.items() if parameter in (GATE_UP, DOWN)}


def both_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of both parameters, ``[out, in]``, where those of one are known: one follows from the other."""
    if GATE_UP in shapes and shapes[GATE_UP][0] % 2 == 0:
        (twice, hidden) = shapes[GATE_UP]
        return {DOWN: (hidden, twice // 2), **shapes}
    if DOWN in shapes:
        (hidden, inner) = shapes[DOWN]
        return {GATE_UP: (2 * inner, hidden), **shapes}
    return dict(shapes)


def compared(shapes: Mapping[str, Shape], known: Mapping[str, Shape]) -> set[bool]:
    """Whether shapes are those that are known, transposed: one answer for each that is not square."""
    found = set()
    for parameter, (n, m) in shapes.items():
        if n != m and known.get(parameter) in ((n, m), (m, n)):
            found.add(known[parameter] == (m, n))
    return found


def own_evidence(updates: Mapping[str, Update]) -> bool | None:
    """Whether the experts of an adapter lie transposed, by its own shapes; ``None`` where they do not tell."""
    shapes = fused_shapes(updates)
    found = set()
    if GATE_UP in shapes and DOWN in shapes:
        (twice, hidden), (out, inner) = shapes[GATE_UP], shapes[DOWN]
        if twice == 2 * inner and hidden == out:
            found.add(False)
        if hidden == 2 * out and twice == inner:
            found.add(True)
    widths = {u.shape[1] for m, u in updates.items() if m.rpartition(".")[2] in HIDDEN_IN}
    widths |= {u.shape[0] for m, u in updates.items() if m.rpartition(".")[2] in HIDDEN_OUT}
    if len(widths) == 1 and not found:
        width = widths.pop()
        for parameter, (n, m) in shapes.items():
            if n != m and width in (n, m):
                found.add((n if parameter == GATE_UP else m) == width)
    return found.pop() if len(found) == 1 else None
