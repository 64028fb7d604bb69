"""Module patterns of an adapter configuration, matched in bounded time.

PEFT takes the keys of ``rank_pattern`` and ``alpha_pattern`` for regular expressions of Python, whose matcher needs
exponential time for some of them. Here RE2 matches, in time linear in the length of the module path. Its language is
not quite Python's, so only what means the same in both is accepted (:data:`SHARED`); the rest is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastlora.errors import InputError

PLAIN = re.compile(r"[\w.]+", re.ASCII)
LARGEST = 10_000
"""Characters of one pattern: above any module path, below what takes long to compile."""
MEMORY = 1 << 18
"""Bytes for one compiled pattern and its states: bounds the time that one character of a path takes."""
PRINTABLE = re.compile("[ -~]*")
"""Texts for which ``\\w``, ``\\d``, ``\\s``, ``\\b``, ``.`` and ``$`` mean the same in both."""
ESCAPED = r"\\[!-/:-@\[-`{-~]"
SHARED = re.compile(
    rf"""
    (?:
      [^\\\[\](){{}}*+?]                                        # a character, also . ^ $ |
    | {ESCAPED} | \\[dDwWsSb]
    | \[ \^? (?: [^\\\[\]^] | {ESCAPED} | \\[dDwWsS] )
          (?: [^\\\[\]] | {ESCAPED} | \\[dDwWsS] )* \]             # a set, none inside it
    | \( (?: \?: | \?P<\w+> )? (?! [*+?{{] ) | \)
    | (?: [*+?] | \{{ \d+ (?: ,\d* )? \}} ) \?? (?! [*+?{{] )    # greedy and lazy match the same paths
    )*
    """,
    re.ASCII | re.VERBOSE,
)
"""Patterns that mean the same to Python and to RE2, if both can read them. Left out are what RE2 cannot do in linear
time (look-around, back references, atomic groups, possessive repetitions) and what it reads in another way: octal
escapes, ``{{,n}}``, sets such as ``[[:alpha:]]``, flags."""


def path_tails(path: str) -> Iterator[str]:
    """The path, and what follows each of its dots: what PEFT lets a module be named by."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


class Unsupported(ValueError):
    """A construct that is not matched in bounded time, or not as Python does."""


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
        self._used: set[str] = set()
        self._tails: dict[str, int] = {}  # ends of paths, after a dot
        self._others: list[tuple[int, Callable[[str], bool]]] = []
        for index, pattern in enumerate(self._keys):
            literal = _literal(pattern)
            if literal is not None:
                self._exact.setdefault(literal, index)
            elif (tail := _tail(pattern)) is not None:
                self._tails.setdefault(tail, index)
            else:
                self._others.append((index, self._compiled(pattern)))

    def value(self, module: str) -> float | None:
        """The number of the first pattern that matches the whole module path, or the part of it after some dot."""
        if not self._keys:
            return None
        index = self._first(module)
        key = module if index is None else self._keys[index]
        self._used.add(key)
        return self._values.get(key)

    @property
    def unused(self) -> list[str]:
        """The patterns that were first for no module that was asked for."""
        return [key for key in self._keys if key not in self._used]

    def _first(self, module: str) -> int | None:
        indices = [self._exact[module]] if module in self._exact else []
        if self._tails:
            indices += [self._tails[tail] for tail in path_tails(module) if tail in self._tails]
        known = min(indices, default=None)
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
            f"{self._place} has the pattern {pattern[:80]!r}, which cannot be matched in bounded time as "
            f"PEFT does ({why}); write it with characters, sets, groups, choices and fewer repetitions only, or name "
            "the modules"
        )


def _literal(pattern: str) -> str | None:
    """The only module that a pattern ``^…`` of escaped characters matches."""
    if not pattern.startswith("^"):
        return None
    text = _unescaped(pattern[1:])
    return text if text and re.escape(text) == pattern[1:] else None


def _tail(pattern: str) -> str | None:
    """The end of a path, from a dot on, that is all that a pattern of escaped characters matches."""
    if pattern.isidentifier():
        return pattern
    text = _unescaped(pattern)
    return text if PLAIN.fullmatch(text) and re.escape(text) == pattern else None


def _unescaped(pattern: str) -> str:
    """The text that a pattern stands for if it is one of escaped characters."""
    return re.sub(r"\\([^\w\s])", r"\1", pattern)


@functools.lru_cache(4096)
def compiled(pattern: str) -> Callable[[str], bool]:
    """Whether a module path is matched. Raises :class:`re.error`, or :class:`Unsupported` for what has no bound."""
    if PLAIN.fullmatch(pattern) and len(pattern) <= LARGEST:
        return functools.partial(_ends_with, pattern)
    return _matcher(rf"(.*\.)?({pattern})$", pattern)


@functools.lru_cache(4096)
def compiled_whole(pattern: str) -> Callable[[str], bool]:
    """The same for patterns that must match the whole module path, as ``re.fullmatch`` does."""
    if len(pattern) <= LARGEST:
        _check_syntax(pattern)  # what is no expression alone may be one inside the parentheses: "a)(b"
    return _matcher(rf"({pattern})$", pattern)


def _matcher(whole: str, pattern: str) -> Callable[[str], bool]:
    if len(pattern) > LARGEST:
        raise Unsupported(f"{len(pattern)} characters")
    _check_syntax(whole)
    shared = SHARED.match(pattern)
    assert shared is not None
    if not PRINTABLE.fullmatch(pattern):
        raise Unsupported("characters that are not printable ASCII")
    if shared.end() < len(pattern):
        raise Unsupported(f"{pattern[shared.end() :][:10]!r} is not supported")
    import re2

    try:
        expression = re2.compile(whole, _options())
    except re2.error as error:
        raise Unsupported(error.args[0].decode()) from None

    def matches(module: str) -> bool:
        if not PRINTABLE.fullmatch(module):
            raise Unsupported(f"the module {module!r} has other characters than printable ASCII")
        return expression.match(module) is not None

    return matches


def _check_syntax(pattern: str) -> None:
    try:
        re.compile(pattern)
    except RecursionError:
        raise Unsupported("too deeply nested") from None


def _options() -> Any:
    import re2

    options = re2.Options()
    options.max_mem = MEMORY
    options.never_capture = True
    options.log_errors = False
    return options


def _ends_with(pattern: str, module: str) -> bool:
    """A pattern of plain characters and dots. (Compiling thousands of those takes seconds.)"""
    start = len(module) - len(pattern)
    if start < 0 or (start and module[start - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(pattern, module[start:], strict=True))
