"""Which projections of image and video models are one weight in one adapter and several in another."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from fastlora.dialects.families import families
from fastlora.dialects.family import Family
from fastlora.dialects.naming import Shape
from fastlora.dialects.projections import FUSED_ENDS, PART_ENDS

ENDS = FUSED_ENDS | PART_ENDS
"""Last parts of the paths of all fused projections and of their parts."""
MOST_ABOVE = 3
"""Names of wrappers that may stand before the path of a module in its model."""


def parts_of(path: str, among: Collection[str] = ()) -> tuple[str, ...] | None:
    """The parts of a fused projection by their full paths, in the order of their rows.

    ``among``: the families that it may be of, all if empty. ``None`` where no family has such a projection, where it
    is a module of its own, or where families do not agree on it.
    """
    return _parts_of(path, frozenset(among))


def wholes_of(path: str, among: Collection[str] = ()) -> tuple[str, ...]:
    """The fused projections that may have this path as a part."""
    return _wholes_of(path, frozenset(among))


def rows_of(path: str, shape: Shape, among: Collection[str] = ()) -> tuple[int, ...] | None:
    """How many rows each part of a fused projection has; ``None`` where its shape does not allow it, or where families
    do not agree on it."""
    within = _placed(path)[1]
    found = {family.rows(within, *shape) for family in _asked(frozenset(among)) if family.parts(within) is not None}
    return found.pop() if len(found) == 1 else None


@lru_cache(1 << 16)
def _parts_of(path: str, among: frozenset[str]) -> tuple[str, ...] | None:
    above, within = _placed(path)
    found = {family.parts(within) for family in _asked(among) if family.canonical(within) is not None}
    # Flux.2 has no parts of what Flux.1 has in parts: who has both forms is no Flux.2, unless the files say so.
    found.discard(None)
    if len(found) != 1:
        return None
    parts = found.pop()
    return None if parts is None else tuple(above + part for part in parts)


@lru_cache(1 << 16)
def _wholes_of(path: str, among: frozenset[str]) -> tuple[str, ...]:
    above, within = _placed(path)
    found = dict.fromkeys(above + whole for family in _asked(among) for whole in family.wholes(within))
    return tuple(found)


@lru_cache(1 << 16)
def _placed(path: str) -> tuple[str, str]:
    """What stands above a module's path in its model, and this path: the longest that some family has."""
    start = 0
    for _ in range(MOST_ABOVE + 1):
        if any((named := f.canonical(path[start:])) is not None and not named.original for f in families().values()):
            return path[:start], path[start:]
        start = path.find(".", start) + 1
        if start == 0:
            break
    return "", path


def _asked(among: frozenset[str]) -> list[Family]:
    return [family for name, family in families().items() if not among or name in among]
