"""What PEFT needs to find the modules of an extracted adapter: experts as it stacks them, names that select, heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fastlora.adapters.differences import DenseChange, ExpertChanges, ParameterChange, ZeroChange
from fastlora.core.architectures import EXPERT_NUMBER, WEIGHT
from fastlora.core.data import Selection
from fastlora.core.model_facts import ModelFacts
from fastlora.core.updates import Update
from fastlora.errors import InputError
from fastlora.formats.peft.names import HEADS

MOST_BEYOND = 64
"""How much larger a weight may be than the largest that changed: experts of one model are of one size."""
HALVES = ("gate_proj", "up_proj")
"""The weights that lie below each other in ``gate_up_proj``."""
LATER_NAMES = {"embed_out": "lm_head"}
"""Heads that newer model code calls otherwise than files do, which PEFT does not translate."""


def fused(name: str, deltas: Mapping[str, ParameterChange], facts: ModelFacts) -> dict[str, ParameterChange]:
    """The changes of a model, those of experts that lie one by one put together: ``gate_up_proj [experts, 2·n, m]`` and
    ``down_proj [experts, n, m]``. What did not change is zero."""
    if not facts.fused_later:
        return dict(deltas)
    changes = {p.removesuffix(WEIGHT): d for p, d in deltas.items() if p.endswith(WEIGHT)}
    shapes = {m: tuple(d.shape) for m, d in changes.items()} | dict(facts.still)
    containers: dict[str, set[int]] = {}
    for match in map(EXPERT_NUMBER.fullmatch, shapes):
        if match is not None:
            containers.setdefault(match[1], set()).add(int(match[2]))
    changed = {m[1] for m in map(EXPERT_NUMBER.fullmatch, changes) if m is not None}
    largest = max((math.prod(d.shape) for d in changes.values()), default=0)

    def weight(module: str) -> ParameterChange:
        found, shape = changes.get(module), shapes.get(module)
        if found is None and (shape is None or math.prod(shape) > MOST_BEYOND * largest):
            raise InputError(
                f"task vector {name!r}: {module} is missing among the experts, or far larger than the others "
                f"({shape}); make the task vector again from both models"
            )
        return ZeroChange(torch.Size(shape or ())) if found is None else found

    result = {p: d for p, d in deltas.items() if EXPERT_NUMBER.fullmatch(p.removesuffix(WEIGHT)) is None}
    for container, numbers in containers.items():
        experts = [f"{container}.{n}" for n in sorted(numbers)]
        if container in changed:
            both = [[weight(f"{e}.{half}") for half in HALVES] for e in experts]
            result[f"{container}.gate_up_proj"] = ExpertChanges(both)
            result[f"{container}.down_proj"] = ExpertChanges([[weight(f"{e}.down_proj")] for e in experts])
    return {p: d for p, d in result.items() if not isinstance(d, DenseChange | ExpertChanges) or d.any()}


def with_later_names(updates: Mapping[str, Update]) -> dict[str, Update]:
    """The updates, those of some heads under both names that the head has: a reader knows one, and leaves the other."""
    later = {LATER_NAMES[m]: u for m, u in updates.items() if m in LATER_NAMES and LATER_NAMES[m] not in updates}
    return {**updates, **later}


def selection(updates: Mapping[str, Update], others: Iterable[str]) -> Selection:
    """What selects the modules of an adapter: their last names, where every module of that name is adapted. That holds
    under names of other versions too, which differ in their beginnings. ``others``: modules that are not adapted."""
    modules = [m for m, u in updates.items() if u.layout.kind != "expert"]
    containers = dict.fromkeys(u.layout.container for u in updates.values() if u.layout.container)
    rest = [*others, *(c.removesuffix(WEIGHT) for c in containers)]
    ends = _ends(modules, rest)
    taken = {end for m in (*modules, *rest) if m + WEIGHT not in containers for end in _parameter_ends(m + WEIGHT)}
    parameters = dict.fromkeys(next((e for e in _parameter_ends(c) if e not in taken), c) for c in containers)
    return Selection(tuple(ends), tuple(parameters))


def _parameter_ends(parameter: str) -> list[str]:
    """The ends of a parameter's path that have its module's name in it, shortest first."""
    parts = parameter.split(".")
    return [".".join(parts[-n:]) for n in range(2, len(parts) + 1)]


def saved_modules(parameters: Iterable[str], task: str | None) -> tuple[str, ...]:
    """The modules to save of parameters that are kept whole: a head of the task as one, others one by one."""
    heads = HEADS.get(task or "", ())
    found = []
    for parameter in parameters:
        parts = parameter.split(".")
        at = next((i for i, part in enumerate(parts) if part in heads), len(parts) - 2)
        found.append(".".join(parts[: at + 1]))
    return tuple(dict.fromkeys(found))


def _ends(modules: list[str], others: list[str]) -> list[str]:
    inside = {part for m in (*modules, *others) for part in m.split(".")[:-1]}
    blocked = inside | {m.rpartition(".")[2] for m in others}
    ends = dict.fromkeys(m.rpartition(".")[2] for m in modules)
    return [end for end in ends if end not in blocked and not end.isdecimal()]
