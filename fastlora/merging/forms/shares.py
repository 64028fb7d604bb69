"""Weights that are shares of a whole: divided by their sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.errors import InputError

# Relative to its terms, a sum of weights below it is zero, and no share of it has a meaning.
NOTHING = 1e-9


def require_sum(method: str, weights: Tensor) -> float:
    """``Σ w_i`` of ``weights [k]``. Raises :class:`InputError` where they add up to zero."""
    total = float(weights.sum())
    if abs(total) <= NOTHING * float(weights.abs().sum()):
        raise InputError(
            f"method {method!r}: the weights {weights.tolist()} add up to {total:g}, and are divided by their sum; "
            "give others, or use the method 'sum', which takes weights as they are"
        )
    return total


def shares(method: str, weights: Tensor) -> Tensor:
    """``w_i / Σ_j w_j`` of ``weights [k]``, as :func:`require_sum` allows it."""
    return weights / require_sum(method, weights)


def normalised(method: str, weights: Mapping[str, float]) -> dict[str, float]:
    """:func:`shares` of weights by name."""
    found = shares(method, torch.tensor(list(weights.values()), dtype=torch.float64))
    return dict(zip(weights, found.tolist(), strict=True))
