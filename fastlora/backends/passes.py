"""What the engine asks of a backend: streaming passes over ragged lists of factors, used where they lie.

These are the ops ``gram`` and ``combine`` without padding or copying; they are private to the engine and no torch
operators.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GramJob:
    """Gram blocks of one module and side. ``factors``: B sides ``[n, r_i]``, or A sides ``[r_i, n]`` with ``rows``.

    ``blocks``: ``(i, j, out)`` with a float64 ``out [r_i, r_j]`` whose last stride is 1.
    """

    factors: list[Tensor]
    blocks: list[tuple[int, int, Tensor]]
    rows: bool


@dataclass(frozen=True, slots=True, eq=False)
class CombineTerm:
    """``out[:, at:at+q] += scale · X C`` (B side) or ``out[at:at+q] += scale · C X`` (A side), ``X = factors[factor]``.

    ``coefficient``: contiguous float64 ``[r, q]`` (B side) or ``[q, r]`` (A side), or ``None`` for the identity.
    """

    factor: int
    coefficient: Tensor | None
    at: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class CombineJob:
    """Results of one module and side that share factors: ``outputs`` are ``(out, terms)``; rows as in GramJob."""

    factors: list[Tensor]
    outputs: list[tuple[Tensor, list[CombineTerm]]]
    rows: bool
