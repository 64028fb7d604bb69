"""What a record holds and nobody has looked at yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PENDING = "_pending"
"""Where a record says how what it lacks is made."""


class Deferred:
    """A field that a record may lack until somebody looks at it, and that is made then. From there on it is a field
    like others, with nothing between it and who reads it. Where several threads look at once, all see one result.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: Any, kind: type | None = None) -> Any:
        # Without a __set__ this is asked only of records that do not have the field themselves.
        make = None if record is None else record.__dict__.get(PENDING)
        if make is not None:
            found = record.__dict__.setdefault(self._name, make())
            record.__dict__.pop(PENDING, None)
            return found
        if record is not None and self._name in record.__dict__:  # another thread has made it
            return record.__dict__[self._name]
        raise AttributeError(f"{(kind or type(record)).__name__!r} has no {self._name!r}")


def deferred(record: Any, name: str, make: Callable[[], object]) -> None:
    """Takes a field from a record, whose class has a :class:`Deferred` in its place, until it is looked at."""
    record.__dict__[PENDING] = make
    del record.__dict__[name]
