"""Fused projections of image and video models in one adapter against their parts in another: ``attn.to_qkv`` and
``attn.to_q``, ``attn.to_k``, ``attn.to_v``; ``attn.to_qkv_mlp_proj`` and these with ``proj_mlp``.

Which they are, and how many rows each part has, is known of every family of models
(:mod:`fastlora.dialects.fusions`). The form of the first adapter is kept. A part may be fused itself: what one trainer
calls ``to_qkv`` are the first rows of another's ``to_qkv_mlp_proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from fastlora.core.data import Extra, LoraData
from fastlora.core.fusing import Stored, rows, stacked
from fastlora.core.updates import LINEAR, Update
from fastlora.dialects.fusions import ENDS, parts_of, rows_of, wholes_of
from fastlora.errors import InputError

A = TypeVar("A", bound=LoraData)

Shape = tuple[int, int]
ShapeOf = Callable[[str], Shape | None]
Span = tuple[int, int]


class ImageProjections:
    """Brings adapters, one after another, to the form that the first have.

    Raises :class:`InputError` for forms that cannot be brought together.
    """

    def __init__(self) -> None:
        self._families: set[str] = set()

    def fitted(self, adapter: A, shape_of: ShapeOf) -> tuple[A, list[str]]:
        """The adapter in the form that earlier ones have, and what was changed, in sentences."""
        form = adapter.base.form
        if form is not None and form.family is not None:
            self._families.add(form.family)
        concerned = [m for m, u in adapter.updates.items() if m.rpartition(".")[2] in ENDS and u.layout == LINEAR]
        if not concerned:
            return adapter, []
        self._refuse_both(adapter, concerned)
        pieces = {m: found for m in concerned if shape_of(m) is None and (found := self._pieces(adapter, m, shape_of))}
        if not pieces:
            return adapter, []
        extras = _moved_biases(adapter, pieces, shape_of)
        refuse_extras(replace(adapter, extras={k: v for k, v in extras.items() if k in adapter.extras}), pieces)
        updates = _moved(adapter.updates, pieces, shape_of)
        return replace(adapter, updates=updates, extras=extras), [_told(adapter, pieces)]

    def _pieces(self, adapter: LoraData, module: str, shape_of: ShapeOf) -> dict[str, tuple[Span, int]]:
        """Where the rows of a module go: ``{module of earlier adapters: (own rows, first row there)}``."""
        update = adapter.updates[module]
        leaves = self._leaves(module)
        for whole in dict.fromkeys(w for leaf in leaves for w in wholes_of(leaf, self._families)):
            shape = shape_of(whole)
            if shape is not None and whole != module and set(leaves) <= set(self._leaves(whole)):
                spans = self._spans(whole, shape)
                if spans is None or shape[1] != update.shape[1] or _length(spans, leaves) != update.shape[0]:
                    raise of_another_model(adapter.name, [module], whole, shape)
                return {whole: ((0, update.shape[0]), spans[leaves[0]][0])}
        return self._cut(adapter, module, shape_of) if leaves != (module,) else {}

    def _cut(self, adapter: LoraData, module: str, shape_of: ShapeOf) -> dict[str, tuple[Span, int]]:
        """The rows of a fused projection that earlier adapters have in parts."""
        update, leaves = adapter.updates[module], self._leaves(module)
        owners = {leaf: self._owner(leaf, leaves, shape_of) for leaf in leaves}
        known = {owner: shape for owner in owners.values() if (shape := shape_of(owner)) is not None}
        if not known:
            return {}
        spans = self._spans(module, update.shape)
        pieces: dict[str, tuple[Span, int]] = {}
        if spans is None:
            raise of_another_model(adapter.name, known, module, update.shape)
        for leaf, owner in owners.items():
            start = pieces[owner][0][0] if owner in pieces else spans[leaf][0]
            pieces[owner] = (start, spans[leaf][1]), 0
        if any(shape != (pieces[owner][0][1] - pieces[owner][0][0], update.shape[1]) for owner, shape in known.items()):
            raise of_another_model(adapter.name, known, module, update.shape)
        return pieces

    def _owner(self, leaf: str, leaves: tuple[str, ...], shape_of: ShapeOf) -> str:
        """The module of earlier adapters that holds a part of a fused projection; the part itself if none does."""
        for whole in wholes_of(leaf, self._families):
            if shape_of(whole) is not None and set(self._leaves(whole)) <= set(leaves):
                return whole
        return leaf

    def _leaves(self, module: str) -> tuple[str, ...]:
        return parts_of(module, self._families) or (module,)

    def _spans(self, whole: str, shape: Shape) -> dict[str, Span] | None:
        """The rows of every part of a fused projection."""
        lengths = rows_of(whole, shape, self._families)
        if lengths is None:
            return None
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        return {leaf: (end - n, end) for leaf, n, end in zip(self._leaves(whole), lengths, ends, strict=True)}

    def _refuse_both(self, adapter: LoraData, concerned: Iterable[str]) -> None:
        """Refuses an adapter that has a projection and a part of it, which no model has."""
        owner: dict[str, str] = {}
        for module in concerned:
            for leaf in self._leaves(module):
                if (other := owner.setdefault(leaf, module)) != module:
                    raise InputError(
                        f"adapter {adapter.name!r} has both {other} and {module}, one weight fused and in parts, which "
                        "no model has; leave out one of the two"
                    )


def _length(spans: Mapping[str, Span], leaves: Iterable[str]) -> int:
    return sum(stop - start for start, stop in (spans[leaf] for leaf in leaves))


def _moved(
    updates: Mapping[str, Update], pieces: Mapping[str, Mapping[str, tuple[Span, int]]], shape_of: ShapeOf
) -> dict[str, Update]:
    """Updates with rows where earlier adapters have them; those that share a target are put together."""
    targets: dict[str, list[tuple[int, Update]]] = {}
    for module, update in updates.items():
        for target, (span, first) in pieces.get(module, {module: ((0, update.shape[0]), 0)}).items():
            piece = update if span == (0, update.shape[0]) else rows(update, *span)
            targets.setdefault(target, []).append((first, piece))
    made: Stored = {}
    moved: dict[str, Update] = {}
    for target, parts in targets.items():
        shape = shape_of(target)
        first, piece = parts[0]
        whole = len(parts) == 1 and (shape is None or piece.shape[0] == shape[0])
        moved[target] = piece if whole or shape is None else stacked(parts, shape[0], made)
    return moved


def _moved_biases(
    adapter: LoraData, pieces: Mapping[str, Mapping[str, tuple[Span, int]]], shape_of: ShapeOf
) -> dict[str, Extra]:
    """Extras with changes of biases where the rows of their modules are; elsewhere a bias does not change."""
    moved: dict[str, Extra] = {}
    for name, extra in adapter.extras.items():
        module, _, leaf = name.rpartition(".")
        if module not in pieces or leaf != "bias" or extra.kind != "delta" or extra.tensor.dim() != 1:
            moved[name] = extra
            continue
        for target, ((start, stop), first) in pieces[module].items():
            shape, rows = shape_of(target), extra.tensor[start:stop]
            earlier = moved.get(f"{target}.bias")
            whole = rows.new_zeros(first + len(rows) if shape is None else shape[0])
            whole[first : first + len(rows)] = rows
            moved[f"{target}.bias"] = Extra("delta", whole if earlier is None else earlier.tensor + whole)
    return moved


def _told(adapter: LoraData, pieces: Mapping[str, Mapping[str, object]]) -> str:
    module, targets = next(iter(pieces.items()))
    if len(targets) > 1:
        return f"adapter {adapter.name!r}: {module}, … takes part as its rows {', '.join(targets)}, …"
    (target,) = targets
    joined = [m for m, found in pieces.items() if target in found]
    return (
        f"adapter {adapter.name!r}: {', '.join(joined)}, … take part as updates of {target}, …: those of the parts "
        "add up"
    )


def of_another_model(adapter: str, parts: Iterable[str], whole: str, shape: Shape) -> InputError:
    """Forms of one weight that do not fit each other."""
    return InputError(
        f"adapter {adapter!r}: {', '.join(parts)} and {whole} {list(shape)} are one weight in parts and fused, but "
        "their shapes do not fit or the order of its rows is not known; convert the adapters to one form with the code "
        "that trained them"
    )


def refuse_extras(adapter: LoraData, modules: Iterable[str]) -> None:
    """Refuses an adapter that changes other parameters of modules whose form changes."""
    changed = set(modules)
    extra = next((p for p in adapter.extras if p.rpartition(".")[0] in changed), None)
    if extra is not None:
        raise InputError(
            f"adapter {adapter.name!r} also changes {extra}, whose module is fused in one adapter and in parts in "
            "another; use `adapter.without_extras()` (`--drop-extras`) to leave such parameters out"
        )
