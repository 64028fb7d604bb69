"""The ranks that an adapter is written with: its own, or one for all where readers cannot take different ones.

Zeros fill the smaller ranks, so ``ΔW`` stays. PEFT stacks the factors of experts that have some of their own, so they
need one rank and no gaps. It also translates the names of older model code, but of tensors only: ranks that a
configuration gives by module would not be found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import replace

from fastlora.core.data import LoraData
from fastlora.core.patterns import path_tails
from fastlora.core.updates import Update, chosen_rank, with_rank
from fastlora.formats.peft.names import block_tail

EXPERT = re.compile(r"(.*experts)\.\d+\..+")
"""A module of one expert of several: ``block_sparse_moe.experts.3.w1``. The group is what they have in common."""

OLDER_TOPS = frozenset("language_model vision_tower visual audio_tower multi_modal_projector".split())
"""First parts of paths in older code of models of several kinds of input, which newer code puts below ``model``."""


def with_readable_ranks(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter with ranks that PEFT can read, and a note where that changed some; all of them ``uniform_rank``, or
    the largest where that is ``True``.

    Raises :class:`InputError` for a number below the adapter's own rank.
    """
    updates = adapter.updates
    rank = chosen_rank(updates.values(), uniform_rank)
    most = max((u.rank for u in updates.values()), default=0)
    if rank is not None:
        kept = (m for m, u in updates.items() if u.rank or f"{m}.bias" in adapter.extras)
        return _filled(adapter, {*kept, *_needed(updates)}, rank)
    wanted = max(most, 1)
    changed = [m for m in _needed(updates) if updates[m].rank != wanted]
    if not changed:
        return adapter
    filled = _filled(adapter, set(changed), wanted)
    return replace(filled, notes=(*adapter.notes, _told(adapter.name, changed, wanted)))


def _filled(adapter: LoraData, modules: Set[str], rank: int) -> LoraData:
    return replace(adapter, updates={m: with_rank(u, rank) if m in modules else u for m, u in adapter.updates.items()})


def _needed(updates: Mapping[str, Update]) -> list[str]:
    """The modules that must have the largest rank, those that are zero among them."""
    if any(m.partition(".")[0] in OLDER_TOPS for m in updates):
        count = Counter(tail for module in updates for tail in path_tails(module))
        return [m for m in updates if count[t := block_tail(m)] > 1 or t == m]
    groups: dict[str, list[str]] = {}
    for module, update in updates.items():
        expert = EXPERT.fullmatch(module)
        if expert is not None and update.layout.kind == "linear":
            groups.setdefault(expert[1], []).append(module)
    # An adapter that is zero is written as zeros in its first module.
    first = next(iter(updates), "")
    return [m for group in groups.values() if any(updates[m].rank for m in group) or first in group for m in group]


def _told(name: str, changed: list[str], rank: int) -> str:
    why = (
        "which PEFT stacks for all experts"
        if EXPERT.fullmatch(changed[0])
        else "since PEFT translates their older names, but finds no rank that a configuration gives by them"
    )
    what = f"{len(changed)} modules ({changed[0]}, …) are written with rank {rank}, filled with zeros"
    return f"adapter {name!r}: {what}, {why}"
