"""Module patterns of an adapter configuration, matched in bounded time.

PEFT takes the keys of ``rank_pattern`` and ``alpha_pattern`` for regular expressions. Python's own matcher needs
exponential time for some of them, so those with several repetitions or choices are walked here by sets of positions,
in a bounded number of steps.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from fastlora.errors import InputError

PLAIN = re.compile(r"[\w.]+", re.ASCII)
CHOICES = re.compile(r"[*+?{|]")
LARGEST = 10_000
"""Characters of one pattern: above any module path, below what takes long to compile."""
MOST_STEPS = 100_000
"""For one module; patterns that say something need some hundred."""
SIMPLE = {"literal", "not_literal", "any", "in"}
REPEATS = {"max_repeat", "min_repeat"}


class Unsupported(ValueError):
    """A construct that cannot be matched in bounded time."""


class Patterns:
    """A number for each pattern, in the order of the file, of which the first that matches counts.

    ``place`` says in messages where they were read. Raises :class:`InputError` for patterns that are no regular
    expressions or that cannot be matched in bounded time.
    """

    def __init__(self, values: Mapping[str, float], place: str) -> None:
        self._values = dict(values)
        self._place = place
        self._keys = tuple(values)
        self._exact: dict[str, int] = {}  # whole paths
        self._last: dict[str, int] = {}  # last parts of paths
        self._others: list[tuple[int, Callable[[str], bool]]] = []
        for index, pattern in enumerate(self._keys):
            literal = _literal(pattern)
            if literal is not None:
                self._exact.setdefault(literal, index)
            elif pattern.isidentifier():
                self._last.setdefault(pattern, index)
            else:
                self._others.append((index, self._compiled(pattern)))

    def value(self, module: str) -> float | None:
        """The number of the first pattern that matches the whole module path, or the part of it after some dot."""
        if not self._keys:
            return None
        index = self._first(module)
        return self._values.get(module if index is None else self._keys[index])

    def _first(self, module: str) -> int | None:
        last = module.rpartition(".")[2]
        found = [i for i in (self._exact.get(module), self._last.get(last)) if i is not None]
        known = min(found, default=None)
        for index, matches in self._others:
            if known is not None and known < index:
                break
            try:
                if matches(module):
                    return index
            except Unsupported as error:
                raise self._refused(self._keys[index], error) from None
        return known

    def _compiled(self, pattern: str) -> Callable[[str], bool]:
        try:
            return compiled(pattern)
        except Unsupported as error:
            raise self._refused(pattern, error) from None
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{self._place} has the pattern {pattern[:80]!r}, which is no regular expression ({error}); "
                "correct the file"
            ) from None

    def _refused(self, pattern: str, why: Exception) -> InputError:
        return InputError(
            f"{self._place} has the pattern {pattern[:80]!r}, which could take forever to match ({why}); "
            "write it with fewer repetitions, or name the modules"
        )


def _literal(pattern: str) -> str | None:
    """The only module that a pattern ``^…`` of escaped characters matches."""
    if not pattern.startswith("^"):
        return None
    text = re.sub(r"\\([^\w\s])", r"\1", pattern[1:])
    return text if text and re.escape(text) == pattern[1:] else None


@functools.lru_cache(4096)
def compiled(pattern: str) -> Callable[[str], bool]:
    """Whether a module path is matched. Raises :class:`re.error`, or :class:`Unsupported` for what has no bound."""
    if len(pattern) > LARGEST:
        raise Unsupported(f"{len(pattern)} characters")
    if PLAIN.fullmatch(pattern):
        return functools.partial(_ends_with, pattern)
    return _matcher(rf"(.*\.)?({pattern})$", pattern)


@functools.lru_cache(4096)
def compiled_whole(pattern: str) -> Callable[[str], bool]:
    """The same for patterns that must match the whole module path, as ``re.fullmatch`` does."""
    if len(pattern) > LARGEST:
        raise Unsupported(f"{len(pattern)} characters")
    parser.parse(pattern)  # what is no expression alone may be one inside the parentheses: "a)(b"
    return _matcher(rf"({pattern})$", pattern)


def _matcher(whole: str, pattern: str) -> Callable[[str], bool]:
    if len(CHOICES.findall(pattern)) <= 1:
        expression = re.compile(whole)
        return lambda module: expression.match(module) is not None
    try:
        tree = parser.parse(whole)
    except (RecursionError, OverflowError):
        raise Unsupported("too deeply nested") from None
    _check(tree)
    return lambda module: bool(_Walk(module).ends(tree, 1))


def _ends_with(pattern: str, module: str) -> bool:
    """A pattern of plain characters and dots. (Compiling thousands of those takes seconds.)"""
    start = len(module) - len(pattern)
    if start < 0 or (start and module[start - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(pattern, module[start:], strict=True))


def _name(op: Any) -> str:
    return str(op).lower()


def _check(tree: Any) -> None:
    if tree.state.flags & ~re.UNICODE.value:
        raise Unsupported("flags")
    for op, argument in tree:
        name = _name(op)
        if name in REPEATS:
            _check(argument[2])
        elif name == "branch":
            for branch in argument[1]:
                _check(branch)
        elif name == "subpattern" and not argument[1] and not argument[2]:
            _check(argument[3])
        elif name in ("assert", "assert_not"):
            _check(argument[1])
        elif name not in SIMPLE and (name != "at" or argument not in (parser.AT_BEGINNING, parser.AT_END)):
            raise Unsupported(name)


class _Walk:
    """Where the parts of one pattern can end in one text. Sets of positions are integers, bit ``i`` for position
    ``i``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self.accepted: dict[tuple[str, int], int] = {}

    def ends(self, tree: Any, starts: int) -> int:
        for op, argument in tree:
            if not starts:
                break
            starts = self._step(_name(op), argument, starts)
        return starts

    def _step(self, name: str, argument: Any, at: int) -> int:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Unsupported("so many repetitions")
        if name in SIMPLE:
            return (at & self._positions(name, argument)) << 1
        if name == "branch":
            return functools.reduce(int.__or__, (self.ends(branch, at) for branch in argument[1]))
        if name == "subpattern":
            return self.ends(argument[3], at)
        if name in REPEATS:
            return self._repeated(argument, at)
        if name == "at":
            return at & (1 if argument == parser.AT_BEGINNING else self._last())
        direction, tree = argument
        wanted = name == "assert"
        return sum(1 << i for i in range(at.bit_length()) if at >> i & 1 and self._seen(direction, tree, i) == wanted)

    def _seen(self, direction: int, tree: Any, at: int) -> bool:
        """Whether something is found after (1) or before (-1) a position."""
        if direction > 0:
            return self.ends(tree, 1 << at) != 0
        start = at - tree.getwidth()[0]
        return start >= 0 and bool(self.ends(tree, 1 << start) >> at & 1)

    def _repeated(self, argument: tuple[int, int, Any], at: int) -> int:
        # Beyond one step a character, a repetition only adds empty ones, which change nothing.
        bound = len(self.text) + 2
        least, most, tree = min(argument[0], bound), min(int(argument[1]), bound), argument[2]
        level = found = at
        for count in range(1, most + 1):
            level = self.ends(tree, level)
            if count > least:
                level &= ~found
                found |= level
            else:
                found = level
            if not level:
                break
        return found

    def _last(self) -> int:
        """The end of the text, and before a line break at the end."""
        n = len(self.text)
        return 1 << n | (1 << n - 1 if self.text.endswith("\n") else 0)

    def _positions(self, name: str, argument: Any) -> int:
        """Where a character stands that is accepted."""
        key = name, argument if isinstance(argument, int) else id(argument)
        if key not in self.accepted:
            self.accepted[key] = sum(1 << i for i, c in enumerate(self.text) if _accepts(name, argument, c))
        return self.accepted[key]


def _accepts(name: str, argument: Any, character: str) -> bool:
    code = ord(character)
    if name == "any":
        return character != "\n"
    if name != "in":
        return bool((code == argument) == (name == "literal"))
    negated, found = False, False
    for op, value in argument:
        kind = _name(op)
        if kind == "negate":
            negated = True
        elif kind == "literal":
            found |= code == value
        elif kind == "range":
            found |= value[0] <= code <= value[1]
        else:
            found |= _category(str(value).lower(), character)
    return found != negated


def _category(name: str, character: str) -> bool:
    letter = {"digit": "d", "space": "s", "word": "w"}[name.rpartition("_")[2]]
    return (re.fullmatch("\\" + letter, character) is not None) != ("_not_" in name)
