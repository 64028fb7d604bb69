"""What a program makes of a single file: which modules it drops, or scales otherwise than the file means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Fault = Literal["lost", "scaled", "wrong", "unsure"]

NO_MODEL = "no such model"
"""In place of an error: the program has no models of the family."""
CLOSE = 1e-6
"""Scales that differ by less are the same: alphas are stored in float16 or float32, and ranks divide them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reader makes of one module that it does not read as meant.

    ``fault``: ``"lost"``: no change reaches the model. ``"scaled"``: ``found`` times ``B·A`` in place of ``meant``
    times. ``"wrong"``: another change. ``"unsure"``: what it does is not known here. ``why``: half a sentence.
    """

    fault: Fault
    why: str
    meant: float | None = None
    found: float | None = None

    @property
    def factor(self) -> float | None:
        """How many times the meant change the reader makes; ``None`` if it is no multiple."""
        if self.fault == "lost":
            return 0.0
        if self.fault != "scaled" or self.meant is None or self.found is None or self.meant == 0.0:
            return None
        return self.found / self.meant


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader makes of a file. ``refused``: the kind of error that it stops with, and why. ``findings``: by the
    file's name of a module; modules without one are read as meant."""

    refused: tuple[str, str] | None = None
    findings: Mapping[str, Finding] = field(default_factory=dict)

    @property
    def has_no_model(self) -> bool:
        """Whether the program has no models of the file's family."""
        return self.refused is not None and self.refused[0] == NO_MODEL


class Refused(Exception):
    """A reader stops with an error. ``error``: its kind; ``why``: half a sentence."""

    def __init__(self, error: str, why: str) -> None:
        super().__init__(error, why)
        self.error = error
        self.why = why


def scaled(meant: float, found: float, why: str) -> Finding | None:
    """The finding about a scale; ``None`` if it is as meant."""
    if math.isclose(meant, found, rel_tol=CLOSE, abs_tol=0.0):
        return None
    return Finding("scaled", why, meant, found)


def lost(why: str) -> Finding:
    """A module of which nothing arrives."""
    return Finding("lost", why)
