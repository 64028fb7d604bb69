"""What makes two sweeps the same one: whether rows that are there already may be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlora.adapters.ia3 import IA3
from fastlora.adapters.lora import Adapter
from fastlora.adapters.task_vector import TaskVector
from fastlora.coefficients.pool_gram import PoolGram
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import InputError

# Inner products of the same adapters, relative to their norms: other machines and threads sum in another order.
EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Identity:
    """``of``: the expression, or the name of the function. ``key``: what the user calls the rest that cannot be
    compared, which is the functions. ``adapters``: by name, the inner products with all adapters."""

    of: str
    key: str | None = None
    adapters: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"of": self.of, "key": self.key, "adapters": self.adapters}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Identity:
        key = data["key"]
        adapters = {str(a): {str(b): float(v) for b, v in row.items()} for a, row in data["adapters"].items()}
        return Identity(str(data["of"]), None if key is None else str(key), adapters)

    def difference(self, earlier: Identity) -> str | None:
        """What of the earlier rows is known to be another, as a sentence; ``None`` if nothing is."""
        if earlier.of != self.of:
            return f"are of {earlier.of!r}, not of {self.of!r}"
        if earlier.key != self.key and earlier.key is not None:
            return f"have the key {earlier.key!r}, not {self.key!r}"
        if earlier.adapters.keys() != self.adapters.keys():
            return f"are of the adapters {_listed(earlier.adapters)}, not of {_listed(self.adapters)}"
        for name, row in self.adapters.items():
            for other, value in row.items():
                scale = math.sqrt(abs(self.adapters[name][name] * self.adapters[other][other]))
                if not abs(value - earlier.adapters[name].get(other, math.nan)) <= EQUAL * scale:
                    return (
                        f"are of another adapter {name!r}"
                        if name == other
                        else (f"are of other adapters {name!r} and {other!r}")
                    )
        return None


def identify(of: str, key: str | None, gram: PoolGram | None, elements: Mapping[str, VectorSpace]) -> Identity:
    """The identity of a sweep over these adapters; costs nothing that a sweep does not need anyway."""
    if key is not None and (not isinstance(key, str) or not key):
        raise InputError(f"sweep: key={key!r} must be a text that names the function, the adapters and the score")
    found: dict[str, dict[str, float]] = {}
    if gram is not None:
        rows = gram.inner().tolist()
        found = {n: dict(zip(gram.pool.names, row, strict=True)) for n, row in zip(gram.pool.names, rows, strict=True)}
    for name, element in elements.items():
        if not isinstance(element, Adapter):
            found[name] = {name: _energy(element)}
    return Identity(of, key, found)


def _energy(element: VectorSpace) -> float:
    """``‖τ‖²`` of a task vector, ``Σ ‖l − 1‖²`` of (IA)³."""
    if isinstance(element, TaskVector):
        return element.norm**2
    assert isinstance(element, IA3)
    return sum(float((element.vector(m).double() - 1).square().sum()) for m in element.modules)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none that were given"
