"""Fused projections of one adapter against their parts in another: ``qkv_proj`` and ``q_proj``, ``k_proj``, ``v_proj``;
``gate_up_proj`` and ``gate_proj``, ``up_proj``.

The form of the first adapter is kept. A fused update is cut into the rows of its parts; parts are put together, with a
block-diagonal ``B``, and their ranks add up. Where the rows of a fused weight are in another order, as those of heads
in turn, the adapters are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.adapters.image_projections import ImageProjections, of_another_model, refuse_extras
from fastlora.core.data import LoraData
from fastlora.core.fusing import Stored, rows, stacked
from fastlora.core.updates import LINEAR, Update
from fastlora.errors import InputError

A = TypeVar("A", bound=LoraData)

Shape = tuple[int, int]
ShapeOf = Callable[[str], Shape | None]
"""The shape of a module that earlier adapters have, ``None`` where none has it."""

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FUSED: Mapping[str, tuple[str, ...]] = {"qkv_proj": QKV, "W_pack": QKV, "gate_up_proj": GATED}
"""Fused weights whose rows are those of their parts, one part after another."""
FUSED_OF: Mapping[str, tuple[str, ...]] = {
    part: tuple(f for f, parts in FUSED.items() if part in parts) for part in (*QKV, *GATED)
}

ATTENTION, MLP = (
    frozenset("attn self_attn attention self_attention self".split()),
    frozenset("mlp feed_forward".split()),
)
KEYS_AND_VALUES = frozenset("k_proj v_proj key value to_k to_v wk wv k_lin v_lin".split())
OTHERS: Sequence[tuple[frozenset[str], frozenset[str], frozenset[str]]] = (
    (
        frozenset(
            "query_key_value c_attn Wqkv wqkv qkv to_qkv to_qkv_mlp_proj in_proj linear_qkv qkv_proj W_pack".split()
        ),
        KEYS_AND_VALUES.union("q_proj query to_q wq q_lin".split()),
        ATTENTION,
    ),
    (frozenset("kv_proj to_kv kv key_value kv_linear".split()), KEYS_AND_VALUES, ATTENTION),
    (frozenset("linear_fc1 dense_h_to_4h w12 gate_up up_gate_proj".split()), frozenset(GATED), MLP),
)
"""Other fused weights, what their parts may be called, and names that both lie below: their rows are those of heads in
turn, or in an order that differs between models."""
OTHER_ENDS = frozenset[str]().union(*(fused | parts for fused, parts, _ in OTHERS))


class FusedProjections:
    """Brings adapters, one after another, to the form that the first have.

    Raises :class:`InputError` for forms that cannot be brought together.
    """

    def __init__(self) -> None:
        self._of_images = ImageProjections()
        self._met: list[tuple[dict[str, str], dict[str, str]]] = [({}, {}) for _ in OTHERS]

    def fitted(self, adapter: A, shape_of: ShapeOf) -> tuple[A, list[str]]:
        """The adapter in the form that earlier ones have, and what was changed, in sentences."""
        adapter, notes = self._of_images.fitted(adapter, shape_of)
        ends = {m.rpartition(".")[2] for m in adapter.updates}
        if not ends.isdisjoint(FUSED_OF) or not ends.isdisjoint(FUSED):
            _refuse_both(adapter)
            adapter, cut = _cut(adapter, shape_of)
            adapter, put = self._put_together(adapter, shape_of)
            notes += [f"adapter {adapter.name!r}: {text}" for text in (cut, put) if text]
        if not ends.isdisjoint(OTHER_ENDS):
            self._refuse_others(adapter)
        return adapter, notes

    def _put_together(self, adapter: A, shape_of: ShapeOf) -> tuple[A, str]:
        """The parts of what earlier adapters have fused, as updates of that."""
        groups: dict[str, dict[str, str]] = {}
        for module, update in adapter.updates.items():
            parent, _, part = module.rpartition(".")
            if update.layout == LINEAR and part in FUSED_OF and shape_of(module) is None:
                fused = next((f for f in _names(parent, FUSED_OF[part]) if shape_of(f) is not None), None)
                if fused is not None:
                    groups.setdefault(fused, {})[part] = module
        if not groups:
            return adapter, ""
        owner = {module: fused for fused, parts in groups.items() for module in parts.values()}
        refuse_extras(adapter, owner)
        updates: dict[str, Update] = {}
        made: Stored = {}
        for module, update in adapter.updates.items():
            fused = owner.get(module, module)
            if fused == module:
                updates[module] = update
            elif fused not in updates:
                updates[fused] = _fused(adapter, fused, groups[fused], shape_of(fused), made)
        first = next(iter(groups))
        ranks = f"of rank {max(updates[f].rank for f in groups)}"
        text = f"{', '.join(groups[first].values())}, … take part as updates of {first}, …, {ranks}"
        return replace(adapter, updates=updates), f"{text}: those of the parts add up"

    def _refuse_others(self, adapter: LoraData) -> None:
        """Refuses a weight that is fused in one adapter and in parts in another, where its rows may be in any order."""
        for (fused_ends, part_ends, above), met in zip(OTHERS, self._met, strict=True):
            found: tuple[dict[str, str], dict[str, str]] = ({}, {})
            for module in adapter.updates:
                parent, _, end = module.rpartition(".")
                for ends, blocks in zip((fused_ends, part_ends), found, strict=True):
                    if end in ends:
                        blocks.setdefault(_block(parent, above), module)
            fused, split = found
            for mine, other, theirs in ((fused, split, met[1]), (split, fused, met[0])):
                block = next((b for b in mine if b in theirs and b not in other), None)
                if block is not None:
                    raise InputError(
                        f"adapter {adapter.name!r} has {mine[block]}, and an adapter before it {theirs[block]}: one "
                        "weight in two forms, fused and in parts, whose rows may be in different orders. Convert the "
                        "adapters to one form with the code that trained them"
                    )
            met[0].update((b, m) for b, m in fused.items() if b not in split)
            met[1].update((b, m) for b, m in split.items() if b not in fused)


def _fused(adapter: LoraData, fused: str, parts: Mapping[str, str], shape: Shape | None, made: Stored) -> Update:
    """The parts of one weight as an update of it."""
    assert shape is not None
    updates = {part: adapter.updates[module] for part, module in parts.items()}
    if any(u.shape[1] != shape[1] for u in updates.values()):
        raise of_another_model(adapter.name, parts.values(), fused, shape)
    starts = part_rows(fused, {part: u.shape[0] for part, u in updates.items()}, shape[0])
    if starts is None:
        raise of_another_model(adapter.name, parts.values(), fused, shape)
    return stacked([(starts[part][0], u) for part, u in updates.items()], shape[0], made)


def _cut(adapter: A, shape_of: ShapeOf) -> tuple[A, str]:
    """What earlier adapters have in parts, cut into these."""
    updates: dict[str, Update] = {}
    done: dict[str, list[str]] = {}
    for module, update in adapter.updates.items():
        parent, _, end = module.rpartition(".")
        names = dict(zip(FUSED.get(end, ()), _names(parent, FUSED.get(end, ())), strict=True))
        known = {part: shape for part, name in names.items() if (shape := shape_of(name)) is not None}
        if not known or update.layout != LINEAR or shape_of(module) is not None:
            updates[module] = update
            continue
        refuse_extras(adapter, [module])
        starts = part_rows(module, {part: n for part, (n, _) in known.items()}, update.shape[0])
        if starts is None or any(m != update.shape[1] for _, m in known.values()):
            raise of_another_model(adapter.name, [names[p] for p in known], module, update.shape)
        updates |= {names[part]: rows(update, *starts[part]) for part in starts}
        done[module] = [names[p] for p in starts]
    if not done:
        return adapter, ""
    first = next(iter(done))
    return replace(adapter, updates=updates), f"{first}, … takes part as its rows {', '.join(done[first])}, …"


def _names(parent: str, ends: Iterable[str]) -> list[str]:
    return [f"{parent}.{end}" if parent else end for end in ends]


def part_rows(fused: str, lengths: Mapping[str, int], total: int) -> dict[str, tuple[int, int]] | None:
    """The rows of every part of a fused weight of ``total`` rows, from what is known of their ``lengths``; ``None``
    where they do not fit, or where this weight has its rows in an order that is not known."""
    parent, _, end = fused.rpartition(".")
    parts = FUSED[end]
    if parts == QKV and parent.rpartition(".")[2] != "self_attn":
        return None
    sizes = dict(lengths)
    if parts == GATED:
        sizes = dict.fromkeys(GATED, next(iter(lengths.values())))
    else:  # keys and values have one width
        side = sizes.get("k_proj", sizes.get("v_proj"))
        side = (total - sizes["q_proj"]) // 2 if side is None else side
        sizes.setdefault("k_proj", side)
        sizes.setdefault("v_proj", side)
        sizes.setdefault("q_proj", total - sizes["k_proj"] - sizes["v_proj"])
    if sum(sizes.values()) != total or min(sizes.values()) < 1 or any(sizes[p] != n for p, n in lengths.items()):
        return None
    ends = [sum(sizes[p] for p in parts[: i + 1]) for i in range(len(parts))]
    return {part: (stop - sizes[part], stop) for part, stop in zip(parts, ends, strict=True)}


def _refuse_both(adapter: LoraData) -> None:
    """Refuses an adapter that has a fused weight and its parts, which no model has."""
    for module in adapter.updates:
        parent, _, end = module.rpartition(".")
        part = next((n for n in _names(parent, FUSED.get(end, ())) if n in adapter.updates), None)
        if part is not None:
            raise InputError(
                f"adapter {adapter.name!r} has both {module} and {part}, one weight fused and in parts, which no model "
                "has; leave out one of the two"
            )


def _block(parent: str, above: frozenset[str]) -> str:
    """The path above the modules of one part of a layer: ``layers.0`` for ``layers.0.attention.self``."""
    parts = parent.split(".")
    while parts and parts[-1] in above:
        parts.pop()
    return ".".join(parts)


def refuse_two_forms(modules_by_adapter: Sequence[tuple[str, Iterable[str]]]) -> None:
    """Refuses a weight that is fused in one adapter and in parts in another, given ``(name, modules)`` of each."""
    known: dict[str, str] = {}
    for adapter, modules in modules_by_adapter:
        own = dict.fromkeys(modules, adapter)
        for module in own:
            parent, _, end = module.rpartition(".")
            others = _names(parent, (*FUSED.get(end, ()), *FUSED_OF.get(end, ())))
            other = next((n for n in others if n in known), None)
            if other is not None and module not in known:
                raise InputError(
                    f"adapter {adapter!r} has {module}, and {known[other]!r} has {other}: one weight, fused and in "
                    "parts, which cannot be combined here; convert the adapters to one form with the code that trained "
                    "them"
                )
        known = own | known


def with_one_projection_form(adapters: Sequence[A]) -> tuple[list[A], list[str]]:
    """Adapters under one naming, their projections as in the adapters before them, and what was changed, in sentences.

    Raises :class:`InputError` for forms that cannot be brought together.
    """
    if all(a.updates.keys() == adapters[0].updates.keys() for a in adapters):
        return list(adapters), []
    shapes: dict[str, Shape] = {}
    result, notes, projections = [], list[str](), FusedProjections()
    for adapter in adapters:
        fitted, more = projections.fitted(adapter, shapes.get)
        for module, update in fitted.updates.items():
            shapes.setdefault(module, update.shape)
        result.append(fitted)
        notes += more
    return result, notes
