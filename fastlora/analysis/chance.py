"""What random subspaces would share: the yardstick beside every spectrum, MATH (10a), (10c), (10d).

Closed forms are limits of large dimensions; what has none is drawn, from a fixed seed and once for each signature of
dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastlora import ops
from fastlora.ops.dispatch import use_backend

GRID = 512  # points of the quadrature of Wachter's law
STEPS = 20  # dimensions are told apart to this share of them where they are drawn
MOST_DRAWS, LEAST_DRAWS, DRAWN_COLUMNS = 32, 8, 4096  # large subspaces fluctuate less, and cost more
REACHED = 0.9  # what this share of draws stays below is the edge of a chain without a law


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
    """Expected number of eigenvalues of ``P_1 P_2`` above ``threshold``, by Wachter's limiting law; above its edge the
    probability that the largest one is there (:func:`largest_exceeds`).

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
    beyond = largest_exceeds(n, small, large, threshold)
    if threshold >= high or high - low < 1e-15:
        return max(atom + (small - atom if high - low < 1e-15 and high > threshold else 0.0), beyond)
    # x = middle + radius·sin(t) turns the square root into radius·cos(t), which the midpoint rule integrates well.
    middle, radius = (low + high) / 2, (high - low) / 2
    start = math.asin(max(-1.0, min(1.0, (threshold - middle) / radius)))
    t = start + (math.pi / 2 - start) * (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    x = middle + radius * t.sin()
    density = radius**2 * t.cos().square() / (2 * math.pi * a * x * (1 - x)).clamp(min=1e-300)
    return max(atom + small * float(density.sum()) * (math.pi / 2 - start) / GRID, beyond)


def largest_exceeds(n: int, p: int, q: int, threshold: float) -> float:
    """The probability that the largest eigenvalue of ``P_1 P_2`` is above ``threshold``, where ``p + q < n``; else 0.

    ``logit λ_1`` has nearly a Tracy–Widom law of centre ``μ`` and width ``σ`` (Johnstone, Annals of Statistics 36,
    2008, for a multivariate beta), which is nearly a shifted gamma law (Chiani, J. Multivariate Analysis 129, 2014).
    """
    if p + q >= n or not 0 < threshold < 1:
        return 0.0
    low, high = (2 * math.asin(math.sqrt((d - 0.5) / (n - 1))) for d in sorted((p, q)))
    centre = 2 * math.log(math.tan((high + low) / 2))
    width = (16 / (n - 1) ** 2 / (math.sin(high + low) ** 2 * math.sin(high) * math.sin(low))) ** (1 / 3)
    s = (math.log(threshold / (1 - threshold)) - centre) / width
    shape, scale, start = 46.446, 0.186054, -9.84801
    quantile = max(0.0, (s - start) / scale)
    return float(torch.special.gammaincc(*torch.tensor([shape, quantile], dtype=torch.float64)))


def expected_mean_of_pair(n: int, p: int, q: int, threshold: float) -> float:
    """Expected number of eigenvalues of ``(P_1 + P_2)/2`` above ``threshold``: ``(1 ± cos θ)/2`` for every angle ``θ``
    of the two, and ``½`` for what the larger one has beyond."""
    small, large = sorted((min(p, n), min(q, n)))
    if threshold >= 0.5:
        return expected_pair(n, p, q, (2 * threshold - 1) ** 2)
    return small + (large - small) + (small - expected_pair(n, p, q, (1 - 2 * threshold) ** 2))


@functools.cache
def palindrome_edge(n: int, dimensions: tuple[int, ...]) -> float:
    """Largest eigenvalue of ``P_1 … P_k … P_1`` for random subspaces, MATH (10c): the law is the free product of those
    of the projections, whose S-transforms are ``(1+z)/(α_i+z)``, so ``1/λ = max_z z(1+z)^(k−1) / Π(α_i+z)``."""
    shares = [min(d / n, 1.0) for d in dimensions]
    if min(shares) == 0:
        return 0.0
    if sum(shares) >= len(shares) - 1:
        return 1.0

    def logarithm(t: float) -> float:
        z = math.exp(t)
        return t + (len(shares) - 1) * math.log1p(z) - sum(math.log(a + z) for a in shares)

    return math.exp(-_largest(logarithm, -40.0, 40.0))


@functools.cache
def mean_edge(n: int, dimensions: tuple[int, ...]) -> float:
    """Largest eigenvalue of ``(1/k) Σ P_i`` for random subspaces, MATH (10d): the law is the free sum of those of the
    projections, so ``kλ = min_g Σ_i K_i(g) − (m−1)/g`` over the ``m`` that are not zero, with the inverse Cauchy
    transforms ``K_i(g) = (g + 1 + √((g+1)² − 4g(1−α_i))) / 2g``."""
    shares = [min(d / n, 1.0) for d in dimensions if d]
    if not shares:
        return 0.0
    if sum(shares) >= len(shares) - 1 and len(shares) > 1:
        return len(shares) / len(dimensions)

    def negative(t: float) -> float:
        g = math.exp(t)
        roots = sum(math.sqrt((g + 1) ** 2 - 4 * g * (1 - a)) for a in shares)
        return -(len(shares) * (g + 1) + roots - 2 * (len(shares) - 1)) / (2 * g)

    return 1 / len(dimensions) if len(shares) == 1 else -_largest(negative, -20.0, 40.0) / len(dimensions)


def _largest(function: Callable[[float], float], low: float, high: float) -> float:
    """The largest value of a function with one maximum, by golden section."""
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-9:
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(right)
    return max(at_left, at_right)


@functools.lru_cache(maxsize=1024)
def drawn_values(n: int, dimensions: tuple[int, ...], chain: str) -> Tensor:
    """Real parts of the eigenvalues of the chain of random subspaces of these dimensions: ``[draws, …]``, of a fixed
    seed, by the op that computes those of adapters.

    The inner products of ``D = Σ d_i < n`` normal vectors are those of the columns of their triangular factor, whose
    entries are independent (Bartlett): nothing of length ``n`` is drawn.
    """
    columns, k, r = sum(dimensions), len(dimensions), max(dimensions)
    draws = max(LEAST_DRAWS, min(MOST_DRAWS, DRAWN_COLUMNS // columns))
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((draws, min(n, columns), columns))
    if columns < n:
        vectors = np.triu(vectors)
        diagonal = np.arange(columns)
        vectors[:, diagonal, diagonal] = np.sqrt(generator.chisquare(n - diagonal, (draws, columns)))
    spans = torch.split_with_sizes(torch.from_numpy(vectors), list(dimensions), -1)
    frames = torch.stack([torch.nn.functional.pad(x, (0, r - x.shape[-1])) for x in spans], 1)  # [draws, k, rows, r]
    there = torch.arange(r) < torch.tensor(dimensions)[:, None]
    other = torch.diag_embed(there.double()).expand(draws, k, r, r).contiguous()
    with use_backend("auto"):  # whatever is forced for adapters, which may be on a device
        gram = ops.gram(frames, blocks="pairs" if chain == "mean" else "chain")
        return ops.chain(gram, other, threshold=0.999, kind=chain, rtol=1e-9).values.real


@functools.lru_cache(maxsize=2**14)
def expected_by_chance(n: int, dimensions: tuple[int, ...], chain: str, threshold: float) -> float:
    """How many directions random subspaces of these dimensions in ``n`` would share above ``threshold``. A zero update
    has the dimension 0: nothing is shared with it, and a mean counts it."""
    present = tuple(d for d in dimensions if d)
    if chain == "mean" and present:
        threshold = threshold * len(dimensions) / len(present)  # of the mean of those that are not zero
        if len(present) == 1:
            return float(min(present[0], n)) if threshold < 1 else 0.0
        if len(present) == 2:
            return expected_mean_of_pair(n, *present, threshold)
    elif len(dimensions) < 2 or len(present) < len(dimensions):
        return 0.0
    elif len(dimensions) == 2:
        return expected_pair(n, *dimensions, threshold)
    if chain != "product" and threshold > 1.25 * chance_edge(n, present, chain) + 0.05:
        return 0.0  # far beyond what fluctuates about the edge: no draws
    values = _drawn(n, present, chain)
    return float((values > threshold).sum()) / len(values)


@functools.lru_cache(maxsize=2**14)
def chance_edge(n: int, dimensions: tuple[int, ...], chain: str = "product") -> float:
    """What reports print beside a spectrum: the largest eigenvalue that random subspaces of these dimensions in ``n``
    have in a chain, MATH (10a), (10c), (10d); of a product of three and more what most draws stay below."""
    present = tuple(sorted(d for d in dimensions if d))
    if len(dimensions) < 2 or (chain != "mean" and len(present) < len(dimensions)):
        return 0.0
    if chain == "mean":
        return mean_edge(n, (*(0 for _ in range(len(dimensions) - len(present))), *present))
    if len(dimensions) == 2:
        return wachter_edge(n, *present)
    if chain == "palindrome":
        return palindrome_edge(n, present)
    largest = _drawn(n, present, chain).max(1).values
    return max(0.0, min(1.0, float(torch.quantile(largest, REACHED))))


def _drawn(n: int, dimensions: Sequence[int], chain: str) -> Tensor:
    """:func:`drawn_values` of nearly these dimensions, so that modules with nearly the same share one sample. Their
    order hardly counts."""
    rounded = []
    for d in sorted(min(d, n) for d in dimensions):
        step = max(1, d // STEPS)
        rounded.append(min(n, step * round(d / step)))
    return drawn_values(n, tuple(rounded), chain)


def pair_edge(n: int, dimensions: tuple[int, ...]) -> float:
    """MATH (10a) of the two largest subspaces: what one pair of them would have as ``cos²``."""
    ordered = sorted(dimensions)
    return wachter_edge(n, ordered[-1], ordered[-2]) if len(ordered) > 1 else 0.0
