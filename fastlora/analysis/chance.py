"""What random subspaces would share: the yardstick beside every spectrum, MATH (10a)."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

SAMPLES = 16  # draws per signature where there is no closed form
GRID = 512  # points of the quadrature of Wachter's law


def wachter_edge(n: int, p: int, q: int) -> float:
    """Largest eigenvalue of ``P_1 P_2`` for random subspaces of dimensions ``p``, ``q`` in ``n``, MATH (10a)."""
    a, b = min(p / n, 1.0), min(q / n, 1.0)
    if a == 0 or b == 0:
        return 0.0
    if a + b >= 1:
        return 1.0
    return (math.sqrt(a * (1 - b)) + math.sqrt(b * (1 - a))) ** 2


@functools.cache
def expected_pair(n: int, p: int, q: int, threshold: float) -> float:
    """Expected number of eigenvalues of ``P_1 P_2`` above ``threshold``, by Wachter's limiting law.

    With ``a <= b <= 1`` the eigenvalues of the smaller subspace have density
    ``√((λ₊−x)(x−λ₋)) / (2π a x (1−x))`` on ``[λ₋, λ₊]`` and an atom of mass ``(a+b−1)/a`` at 1 where ``a + b > 1``.
    """
    small, large = sorted((min(p, n), min(q, n)))
    if small == 0:
        return 0.0
    a, b = small / n, large / n
    root_low, root_high = math.sqrt(a * (1 - b)), math.sqrt(b * (1 - a))
    low, high = (root_high - root_low) ** 2, (root_high + root_low) ** 2
    atom = max(0.0, (a + b - 1) / a) * small
    if threshold >= high or high - low < 1e-15:
        return atom + (small - atom if high - low < 1e-15 and high > threshold else 0.0)
    # x = middle + radius·sin(t) turns the square root into radius·cos(t), which the midpoint rule integrates well.
    middle, radius = (low + high) / 2, (high - low) / 2
    start = math.asin(max(-1.0, min(1.0, (threshold - middle) / radius)))
    t = start + (math.pi / 2 - start) * (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    x = middle + radius * t.sin()
    density = radius**2 * t.cos().square() / (2 * math.pi * a * x * (1 - x)).clamp(min=1e-300)
    return atom + small * float(density.sum()) * (math.pi / 2 - start) / GRID


@functools.cache
def expected_by_sampling(n: int, dimensions: tuple[int, ...], chain: str, threshold: float) -> float:
    """Expected number of eigenvalues above ``threshold`` for random subspaces of these dimensions, from ``SAMPLES``
    draws of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for _ in range(SAMPLES):
        frames = [random_frame(n, d, generator) for d in dimensions]
        count += int((chain_values(frames, chain) > threshold).sum())
    return count / SAMPLES


def random_frame(n: int, d: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis ``[n, min(d, n)]`` of a random subspace."""
    frame: Tensor
    frame, _ = torch.linalg.qr(torch.randn(n, min(d, n), generator=generator, dtype=torch.float64))
    return frame


def chain_values(frames: list[Tensor], chain: str) -> Tensor:
    """Real parts of the eigenvalues of the chain of projections on some frames ``[n, d_i]``."""
    values: Tensor
    if chain == "mean":
        stacked = torch.cat(frames, 1)
        values = torch.linalg.eigvalsh(stacked.mT @ stacked)
        return values / len(frames)
    c = frames[0].mT @ frames[1]
    for left, right in pairwise(frames[1:]):
        c = c @ (left.mT @ right)
    if chain == "palindrome":
        values = torch.linalg.svdvals(c)
        return values.square()
    values = torch.linalg.eigvals(c @ (frames[-1].mT @ frames[0]))
    return values.real


def expected_by_chance(n: int, dimensions: tuple[int, ...], chain: str, threshold: float) -> float:
    """How many directions random subspaces of these dimensions in ``n`` would share above ``threshold``."""
    if len(dimensions) < 2 or min(dimensions) == 0:
        return 0.0
    if len(dimensions) == 2 and chain != "mean":
        return expected_pair(n, *dimensions, threshold)
    if _edge(n, dimensions, chain) < threshold:
        return 0.0
    return expected_by_sampling(n, dimensions, chain, threshold)


def _edge(n: int, dimensions: tuple[int, ...], chain: str) -> float:
    """An upper bound of what chance reaches, so that the common case needs no sampling.

    A product's eigenvalues are at most its norm, which is at most the largest cosine of any neighbouring pair;
    ``(1/k)ΣP_i`` is at most ``(1 + (k−1)·largest cosine)/k``. A tenth is added for fluctuations beyond the limit law.
    """
    ordered = sorted(dimensions)
    cosine = math.sqrt(wachter_edge(n, ordered[-1], ordered[-2]))
    bound = cosine if chain != "mean" else (1 + (len(dimensions) - 1) * cosine) / len(dimensions)
    return min(1.0, 1.1 * bound)


def chance_edge(n: int, dimensions: tuple[int, ...]) -> float:
    """MATH (10a) for the two largest subspaces: the edge printed beside a spectrum."""
    if len(dimensions) < 2:
        return 0.0
    ordered = sorted(dimensions)
    return wachter_edge(n, ordered[-1], ordered[-2])
