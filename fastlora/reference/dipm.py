"""DiPM on dense matrices in float64, MATH section 5 and docs/dipm.md as they are written.

A decoupled matrix is a stack of vectors ``[P, …]``: the columns of ``X [n, m]`` (``[m, n]``), its components (``[P, n,
m]`` for the product, or ``[P, n]``, ``[P, m]`` for one of the two sides), or the whole matrix (``[1, n, m]``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Decoupled = tuple[Tensor, Tensor]
"""``(D [P, …], μ [P])``."""


def decouple(vectors: Tensor) -> Decoupled:
    """MATH (11): unit vectors and norms; a zero vector keeps the direction zero."""
    magnitudes = vectors.flatten(1).norm(dim=1)
    return _normalised(vectors), magnitudes


def recombine(parts: Decoupled) -> Tensor:
    """MATH (12)."""
    directions, magnitudes = parts
    return directions * _spread(magnitudes, directions)


def columns(x: Tensor) -> Tensor:
    """The columns of ``X [n, m]`` as a stack ``[m, n]``."""
    return x.mT


def components(x: Tensor, on: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(vectors, U [n, rank], V [m, rank])`` of the largest components; signs by the largest entry of ``u``."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], vh[:rank].mT
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    u, v = u * sign, v * sign
    vectors = torch.einsum("np,p,mp->pnm", u, s, v) if on == "product" else ((u if on == "B" else v) * s).mT
    return vectors, u, v


def reverse(parts: Decoupled, strength: float) -> Decoupled:
    """The opposite directions, the magnitudes times ``strength``."""
    directions, magnitudes = parts
    return -directions, strength * magnitudes


def scale(parts: Decoupled, strength: float) -> Decoupled:
    """The same directions, the magnitudes times ``strength``."""
    return parts[0], strength * parts[1]


def shift(parts: Decoupled, source: Decoupled, target: Decoupled, strength: float) -> Decoupled:
    """Directions moved by ``strength`` times the difference of two others and made unit again, the same magnitudes."""
    return _with(_normalised(parts[0] + strength * (target[0] - source[0])), parts[1])


def interpolate(parts: Decoupled, other: Decoupled, t: float) -> Decoupled:
    """Spherical by the angle between the directions; the other direction where one is zero."""
    first, second = parts[0], other[0]
    magnitudes = (1 - t) * parts[1] + t * other[1]
    result = torch.zeros_like(first)
    for p in range(len(first)):
        one, two = first[p], second[p]
        if not one.any() or not two.any():
            result[p] = one + two
            continue
        cosine = float((one * two).sum().clamp(-1, 1))
        if cosine < -1 + 1e-9:
            result[p] = one if t <= 0.5 else two
            continue
        # Along the great circle: by the angle t·θ from `one` towards the part of `two` that is orthogonal to it.
        side = two - cosine * one
        if float(side.norm()) < 1e-12:
            result[p] = one
            continue
        angle = torch.atan2(side.norm(), torch.tensor(cosine, dtype=torch.float64))
        result[p] = (t * angle).cos() * one + (t * angle).sin() * side / side.norm()
    return _with(result, magnitudes)


def remove(parts: Decoupled, others: Sequence[Decoupled], strength: float) -> Decoupled:
    """Projection on the span of the others' directions at the same place, by least squares."""
    directions, magnitudes = parts
    result = torch.zeros_like(directions)
    for p in range(len(directions)):
        span = torch.stack([d[p].flatten() for d, _ in others], 1)
        amounts = torch.linalg.pinv(span, rtol=1e-6) @ directions[p].flatten()
        result[p] = directions[p] - strength * (span @ amounts).reshape(directions[p].shape)
    return _with(_normalised(result, 1e-6), magnitudes)


def _normalised(vectors: Tensor, floor: float = 0.0) -> Tensor:
    norms = _spread(vectors.flatten(1).norm(dim=1), vectors)
    return torch.where(norms > floor, vectors / norms, 0.0)


def _with(directions: Tensor, magnitudes: Tensor) -> Decoupled:
    return directions, magnitudes * directions.flatten(1).any(1)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
