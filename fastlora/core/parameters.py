"""What users may set by name: parameters of a function, read from its signature and its docstring."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from fastlora.errors import InputError

REQUIRED = inspect.Parameter.empty
"""The default of a parameter that has none."""

KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}
"""The types that a parameter may have, and what messages call their values."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its ``name``, its type ``kind``, what it means, the ``choices`` of a word, and its ``default``."""

    name: str
    kind: type
    help: str
    choices: tuple[str, ...] = ()
    default: object = REQUIRED

    @property
    def required(self) -> bool:
        """Whether the parameter has no default."""
        return self.default is REQUIRED

    def __str__(self) -> str:
        """As a table shows it: ``density=0.2``, ``rank: int`` where the default is nothing or is chosen later."""
        if self.required or self.default is None:
            return f"{self.name}: {self.kind.__name__}"
        return f"{self.name}={self.default}"

    def convert(self, value: object, owner: str) -> object:
        """The value as the function takes it; text is read. ``owner`` is what the message begins with."""
        converted = _READERS[self.kind](value)
        if converted is None:
            raise InputError(f"{owner}: {self.name}={value!r} is not {KINDS[self.kind]}; {self.name}: {self.help}")
        if self.choices and converted not in self.choices:
            raise InputError(f"{owner}: {self.name}={converted!r} does not exist: use one of {', '.join(self.choices)}")
        return converted


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword-only parameters of a function, by name, in the order of its signature.

    The type is the annotation: ``bool``, ``int``, ``float``, ``str``, a ``Literal`` of words, or one of them or
    ``None``. What a parameter means stands in the section ``Args`` of the docstring.

    Raises :class:`TypeError` for another type, or where the docstring does not say what a parameter means.
    """
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = typing.get_type_hints(function) if keywords else {}
    meanings = _meanings(inspect.getdoc(function) or "")
    parameters = {}
    for keyword in keywords:
        where = f"{function.__name__}: the parameter {keyword.name!r}"
        kind, choices = _kind(hints.get(keyword.name), where)
        if not meanings.get(keyword.name):
            raise TypeError(f"{where} has no line in the section Args of the docstring")
        parameters[keyword.name] = Parameter(keyword.name, kind, meanings[keyword.name], choices, keyword.default)
    return parameters


def _kind(annotation: Any, where: str) -> tuple[type, tuple[str, ...]]:
    """The type and the choices that an annotation stands for."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        others = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        annotation = others[0] if len(others) == 1 else annotation
    if typing.get_origin(annotation) is Literal and all(isinstance(c, str) for c in typing.get_args(annotation)):
        return str, typing.get_args(annotation)
    if annotation not in KINDS:
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"{where} needs a type: one of {names}, a Literal of words, or one of them | None")
    return annotation, ()


def _meanings(doc: str) -> dict[str, str]:
    """``{name: meaning}`` of the section ``Args``, every meaning in one line."""
    lines = iter(doc.splitlines())
    for line in lines:
        if line.strip() == "Args:":
            break
    meanings: dict[str, str] = {}
    name, indent = "", None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        indent = depth if indent is None else indent
        if depth < indent or depth == 0:
            break
        if depth == indent:
            name, _, text = line.strip().partition(":")
            meanings[name] = text.strip()
        else:
            meanings[name] = f"{meanings[name]} {line.strip()}".strip()
    return meanings


def _read_bool(value: object) -> bool | None:
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())


def _read_int(value: object) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _read_float(value: object) -> float | None:
    if not isinstance(value, Real | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_str(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


_READERS: dict[type, Callable[[object], object]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
}
