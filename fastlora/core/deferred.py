"""What a record holds and nobody has looked at yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

PENDING = "_pending"
"""Where a record has the :class:`Later` of what it lacks."""


class Later(NamedTuple):
    """How a field is made, and what is known of it before: records whose ``outline`` is one object will differ in
    nothing but numbers there."""

    make: Callable[[], object]
    outline: object


class Deferred:
    """A field that a record may lack until somebody looks at it, and that is made then. From there on it is a field
    like others, with nothing between it and who reads it. Where several threads look at once, all see one result.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: Any, kind: type | None = None) -> Any:
        # Without a __set__ this is asked only of records that do not have the field themselves.
        later = None if record is None else record.__dict__.get(PENDING)
        if later is not None:
            found = record.__dict__.setdefault(self._name, later.make())
            record.__dict__.pop(PENDING, None)
            return found
        if record is not None and self._name in record.__dict__:  # another thread has made it
            return record.__dict__[self._name]
        raise AttributeError(f"{(kind or type(record)).__name__!r} has no {self._name!r}")


def deferred(record: Any, name: str, later: Later) -> None:
    """Takes a field from a record, whose class has a :class:`Deferred` in its place, until it is looked at."""
    record.__dict__[PENDING] = later
    del record.__dict__[name]


def outline_of(record: object) -> object | None:
    """What is known of a field that nobody has looked at; ``None`` where it is there."""
    later = record.__dict__.get(PENDING)
    return None if later is None else later.outline
