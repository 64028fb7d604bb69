"""Weights that are shares of a whole: divided by their sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.errors import InputError

# Relative to its terms, a sum of weights below it is zero, and no share of it has a meaning.
NOTHING = 1e-9


def normalised(method: str, weights: Mapping[str, float]) -> dict[str, float]:
    """``w_i / Σ_j w_j``. Raises :class:`InputError` where the weights add up to zero."""
    total = sum(weights.values())
    if abs(total) <= NOTHING * sum(abs(w) for w in weights.values()):
        raise InputError(
            f"method {method!r}: the weights {list(weights.values())} add up to {total:g}, and are divided by their "
            "sum; give others, or use the method 'sum', which takes weights as they are"
        )
    return {name: weight / total for name, weight in weights.items()}


def shares(method: str, weights: Tensor) -> Tensor:
    """:func:`normalised` of ``weights [k]``."""
    names = [str(i) for i in range(len(weights))]
    found = normalised(method, dict(zip(names, weights.tolist(), strict=True)))
    return torch.tensor(list(found.values()), dtype=torch.float64)
