"""The same module twice in one file, under two names, or fused and in parts: equal ones count once, others are
refused, since readers apply one of them, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlora.core.fusing import rows
from fastlora.core.updates import Update
from fastlora.dialects.family import Family
from fastlora.dialects.naming import Named
from fastlora.dialects.suffixes import same
from fastlora.errors import InputError


def require_same(first: Update, second: Update, stems: Sequence[str], file: Path) -> None:
    """Refuses two updates of one module that are not the same to the bit."""
    if not _equal(first, second):
        raise InputError(
            f"{file}: {stems[0]!r} and {stems[1]!r} are one module under two names, with different numbers; readers "
            "apply one of the two, or both: remove one"
        )


def without_parts(
    updates: Mapping[str, Update],
    named: Mapping[str, Named],
    stems: Mapping[str, str],
    family: Family | None,
    file: Path,
) -> tuple[dict[str, Update], list[str]]:
    """The updates without those that say again what a fused one says, and their modules.

    Raises :class:`InputError` where a fused projection and its parts differ. ``stems``: ``{module: stem}``.
    """
    kept, dropped = dict(updates), list[str]()
    if family is None:
        return kept, dropped
    owners: dict[str, str] = {}
    for module, update in updates.items():
        name = named[stems[module]]
        parts = None if name.component else family.parts(name.path)
        for part in parts or ():
            other = owners.setdefault(part, module)
            if other != module:
                raise InputError(
                    f"{file}: {stems[other]!r} and {stems[module]!r} are fused projections that share {part}; readers "
                    "apply one of the two, or both: remove one"
                )
        there = [part for part in parts or () if part in kept]
        if not parts or not there:
            continue
        counts = family.rows(name.path, *update.shape)
        starts = [sum((counts or ())[:i]) for i in range(len(parts))]
        for part in there:
            i = parts.index(part)
            if counts is None or not _equal(rows(update, starts[i], starts[i] + counts[i]), kept[part]):
                raise InputError(
                    f"{file}: {stems[module]!r} is a fused projection, and {stems[part]!r} is a part of it, with "
                    "different numbers; readers apply one of the two, or both: remove one"
                )
            del kept[part]
            dropped.append(part)
    return kept, dropped


def _equal(first: Update, second: Update) -> bool:
    pairs = ((first.B.stored, second.B.stored), (first.A.stored, second.A.stored))
    if first.scaling != second.scaling or first.layout != second.layout:
        return False
    return all(a is not None and b is not None and same(a, b) for a, b in pairs)
