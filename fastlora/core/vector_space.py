"""``+``, ``-``, ``*`` and ``/`` for whatever can be added and scaled: LoRA adapters, (IA)³ adapters, task vectors.

Each kind is a vector space of its own (MATH section 4): a LoRA adapter through ``ΔW``, (IA)³ through ``l − 1``, a task
vector through the change of every parameter. Kinds do not mix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import ClassVar, Self, TypeVar

from fastlora.core.data import AdapterData
from fastlora.errors import InputError

X = TypeVar("X", bound="VectorSpace")


class VectorSpace(AdapterData, ABC):
    """An element of a vector space; a kind defines :meth:`weighted_sum`, the operators follow."""

    kind: ClassVar[str]
    """What messages call it, with its article."""

    @classmethod
    @abstractmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, Self]], name: str | None = None) -> Self:
        """``Σ w_i x_i`` of elements of this kind, one at least; the weights are finite."""

    def __mul__(self, weight: float) -> Self:
        if not isinstance(weight, Real):
            return NotImplemented
        return linear([(weight, self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise InputError(f"{self.name!r} cannot be divided by 0")
        return linear([(1.0 / divisor, self)])

    def __neg__(self) -> Self:
        return linear([(-1.0, self)])

    def __add__(self, other: Self) -> Self:
        return linear([(1.0, self), (1.0, other)]) if isinstance(other, VectorSpace) else NotImplemented

    def __sub__(self, other: Self) -> Self:
        return linear([(1.0, self), (-1.0, other)]) if isinstance(other, VectorSpace) else NotImplemented


def linear(terms: Iterable[tuple[float, X]], name: str | None = None) -> X:
    """``Σ w_i x_i``. Raises :class:`InputError` for weights that are not finite and for mixed kinds."""
    pairs = [(float(w), x) for w, x in terms]
    for weight, element in pairs:
        if not math.isfinite(weight):
            raise InputError(f"the weight of {element.name!r} is {weight}: it must be a finite number")
    require_one_kind([x for _, x in pairs])
    return pairs[0][1].weighted_sum(pairs, name)


def require_one_kind(elements: Sequence[VectorSpace]) -> None:
    """Refuses to combine different kinds, with the way out."""
    dora = next((e for e in elements if e.kind == "a DoRA adapter"), None)
    if dora is not None:
        dora.weighted_sum([(1.0, dora)])  # says why it cannot be combined with anything
    first = elements[0]
    other = next((e for e in elements if type(e) is not type(first)), None)
    if other is None:
        return
    out = "write each into the base model, with `fastlora apply BASE A --out TUNED`, and combine what "
    out += "`fl.task_vector(BASE, TUNED)` makes of them"
    if "a task vector" in (first.kind, other.kind) and "a LoRA adapter" in (first.kind, other.kind):
        out = "make a LoRA adapter of the task vector first: `.extract(rank=…)` or `.extract(energy=…)`"
    raise InputError(
        f"{first.name!r} is {first.kind} and {other.name!r} is {other.kind}: what they add up to depends on the base "
        f"model, so they cannot be combined here; {out}"
    )


def expression(terms: Sequence[tuple[float, str]]) -> str:
    """A sum as text: ``0.7*a - b``."""
    parts = [("- " if w < 0 else "+ ") + (n if abs(w) == 1 else f"{abs(w):g}*{n}") for w, n in terms]
    return " ".join(parts).removeprefix("+ ")
