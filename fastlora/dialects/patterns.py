"""Tables of module names with numbers in them, and look-ups by dotted and by flat spelling.

A pattern is a path in which ``#`` stands for any number and ``{a,b}`` for each of several texts. *Flat* spelling has
underscores for dots. A flat name is never split at its underscores: the number-free skeletons of all names of a model
are known, and a name is looked up by its skeleton.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

ANY = "#"
MOST_DIGITS = 4
_STAND_IN = "9" * (MOST_DIGITS + 1)
"""Takes the place of ``#`` while a skeleton is made: no name that is accepted has this number."""
_DOTTED_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
_FLAT_NUMBER = re.compile(r"(?<![^_])[0-9]+(?![^_])")
_DIGIT = re.compile("[0-9]")
_GROUP = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Found:
    """A name that a table has. ``path``: canonical. ``pattern``: of the path, with ``#`` for ``numbers``."""

    path: str
    pattern: str
    numbers: tuple[str, ...]
    original: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """One spelling of one row: the numbers that it has in its skeleton, ``None`` for any, and what it stands for."""

    fixed: tuple[str | None, ...]
    pattern: str
    original: bool


def expanded(pattern: str) -> list[str]:
    """The texts that a pattern's groups stand for, in order: ``a.{b,c}`` is ``a.b`` and ``a.c``."""
    pieces = _GROUP.split(pattern)
    options = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def paired(rows: Mapping[str, str]) -> dict[str, str]:
    """Rows without groups: both sides are expanded and taken side by side; an empty side stays empty."""
    pairs: dict[str, str] = {}
    for canonical, original in rows.items():
        left = expanded(canonical)
        pairs.update(zip(left, expanded(original) if original else [""] * len(left), strict=True))
    return pairs


def filled(pattern: str, numbers: Iterable[str]) -> str:
    """A pattern with numbers in place of its ``#``."""
    pieces = pattern.split(ANY)
    return pieces[0] + "".join(n + piece for n, piece in zip(numbers, pieces[1:], strict=True))


class Table:
    """The modules of a model: ``{canonical pattern: original pattern}``, ``""`` where the original code has none, and
    further spellings that are read only, ``{pattern: canonical pattern}``."""

    def __init__(self, names: Mapping[str, str], also_read: Mapping[str, str] | None = None) -> None:
        self._originals = names
        self._also_read = also_read or {}

    @cached_property
    def _dotted(self) -> dict[str, list[_Entry]]:
        return self._index(lambda text: text, _DOTTED_NUMBER)

    @cached_property
    def _flat(self) -> dict[str, list[_Entry]]:
        return self._index(lambda text: text.replace(".", "_"), _FLAT_NUMBER)

    def _index(self, spelled: Callable[[str], str], number: re.Pattern[str]) -> dict[str, list[_Entry]]:
        index: dict[str, list[_Entry]] = {}
        for spelling, canonical, original in self._spellings():
            text = spelled(spelling)
            if _DIGIT.search(text):
                text = text.replace(ANY, _STAND_IN)
                fixed = tuple(None if n == _STAND_IN else n for n in number.findall(text))
                text = number.sub(ANY, text)
            else:
                fixed = (None,) * text.count(ANY)
            index.setdefault(text, []).append(_Entry(fixed, canonical, original))
        return index

    def _spellings(self) -> Iterator[tuple[str, str, bool]]:
        for canonical, original in self._originals.items():
            yield canonical, canonical, False
            if original and original != canonical:
                yield original, canonical, True
        for spelling, canonical in self._also_read.items():
            yield spelling, canonical, True

    def dotted(self, text: str) -> Found | None:
        """A dotted path in either spelling; ``None`` where the model has no such module."""
        return _looked_up(self._dotted, text, _DOTTED_NUMBER)

    def flat(self, text: str) -> Found | None:
        """A flat name in either spelling; ``None`` where the model has no such module."""
        return _looked_up(self._flat, text, _FLAT_NUMBER)

    def original(self, found: Found) -> str | None:
        """The dotted original path of a module; ``None`` where the original code has no such module."""
        pattern = self._originals[found.pattern]
        return filled(pattern, found.numbers) if pattern else None


def _looked_up(index: Mapping[str, list[_Entry]], text: str, number: re.Pattern[str]) -> Found | None:
    entries = index.get(number.sub(ANY, text))
    if entries is None or ANY in text:
        return None
    numbers = number.findall(text)
    if any(len(n) > MOST_DIGITS or (n[0] == "0" and n != "0") for n in numbers):
        return None
    for entry in entries:
        if all(f is None or f == n for f, n in zip(entry.fixed, numbers, strict=True)):
            free = tuple(n for f, n in zip(entry.fixed, numbers, strict=True) if f is None)
            return Found(filled(entry.pattern, free), entry.pattern, free, entry.original)
    return None
