"""What random subspaces share: closed forms and samples against draws of whole subspaces."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from builders import generator
from pools import make_pool
from tolerances import FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.analysis.chance import (
    chance_edge,
    drawn_values,
    expected_by_chance,
    expected_mean_of_pair,
    expected_pair,
    largest_exceeds,
    mean_edge,
    pair_edge,
    palindrome_edge,
    wachter_edge,
)
from fastlora.reference.devec import operator

PAIRS = [
    (400, 40, 40),
    (400, 20, 100),
    (400, 100, 20),
    (300, 120, 150),
    (300, 150, 150),
    (300, 200, 150),
    (300, 300, 100),
]
CHAINS = ("product", "palindrome", "mean")


@functools.cache
def draws(n: int, dimensions: tuple[int, ...], chain: str = "product", count: int = 6, seed: int = 5) -> list[Tensor]:
    """Eigenvalues of dense chains of random projections, those that are not zero by construction: real parts."""
    g = generator(seed)
    found = []
    for _ in range(count):
        projectors = []
        for d in dimensions:
            frame = torch.linalg.qr(torch.randn(n, d, generator=g, dtype=torch.float64)).Q
            projectors.append(frame @ frame.mT)
        values = torch.linalg.eigvals(operator(projectors, chain)).real.sort(descending=True).values
        found.append(values[: min(n, sum(dimensions)) if chain == "mean" else min(dimensions)])
    return found


def counted(values: list[Tensor], threshold: float) -> float:
    return sum(int((v > threshold).sum()) for v in values) / len(values)


@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_edge(n: int, p: int, q: int) -> None:
    """The largest eigenvalue of a draw is near the edge, on average below it by about ``n^(−2/3)``."""
    largest = torch.stack([v.max() for v in draws(n, (p, q))])
    assert -0.05 < float(largest.mean()) - wachter_edge(n, p, q) < 0.01
    assert wachter_edge(n, p, q) == pytest.approx(wachter_edge(n, q, p), abs=FLOAT64)


def test_edges_by_hand() -> None:
    assert wachter_edge(100, 10, 10) == pytest.approx(4 * 0.1 * 0.9)
    assert wachter_edge(100, 50, 50) == wachter_edge(100, 70, 60) == wachter_edge(10, 16, 16) == 1.0
    assert wachter_edge(100, 0, 50) == 0.0
    assert pair_edge(100, (5, 10, 3, 10)) == wachter_edge(100, 10, 10)
    assert pair_edge(100, (5,)) == 0.0
    for chain in CHAINS:
        assert chance_edge(100, (5,), chain) == 0.0
    # k subspaces of the share α: the free sum of k projections ends at 1 + α(k−2) + 2√((k−1)α(1−α)).
    for k in (2, 3, 5):
        root = 2 * math.sqrt((k - 1) * 0.1 * 0.9)
        assert chance_edge(100, (10,) * k, "mean") == pytest.approx((1 + 0.1 * (k - 2) + root) / k, abs=1e-9)
    # Three small subspaces: 1/λ = max z(1+z)²/(α+z)³, which is 4/(27α²) as α goes to 0.
    assert palindrome_edge(10**7, (10, 10, 10)) == pytest.approx(6.75e-12, rel=1e-4)


@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_edges_of_other_chains_at_two_are_those_of_the_pair(n: int, p: int, q: int) -> None:
    assert palindrome_edge(n, (p, q)) == pytest.approx(wachter_edge(n, p, q), abs=1e-9)
    assert mean_edge(n, (p, q)) == pytest.approx((1 + math.sqrt(wachter_edge(n, p, q))) / 2, abs=1e-9)


SPACES = [
    (60, (4, 4)), (60, (6, 6, 6)), (60, (6, 12, 3)), (64, (6,) * 4), (80, (1, 1, 1)), (60, (20, 9, 14)),
    (40, (20, 30, 25)), (40, (40, 5, 5)), (60, (3, 8, 8, 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("n", "dimensions"), SPACES, ids=str)
def test_edge_of_every_chain(n: int, dimensions: tuple[int, ...], chain: str) -> None:
    """It lies where the largest of draws lie: not below most of them, nor far beyond all."""
    largest = torch.tensor([max(float(v.max()), 0.0) for v in draws(n, dimensions, chain, count=100)])
    edge = chance_edge(n, dimensions, chain)
    assert 0.8 * float(largest.mean()) <= edge <= 1.5 * float(largest.max()) + FLOAT64


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("n", "dimensions"), SPACES, ids=str)
def test_expected_number_of_every_chain(n: int, dimensions: tuple[int, ...], chain: str) -> None:
    values = draws(n, dimensions, chain, count=100)
    largest = torch.tensor([float(v.max()) for v in values], dtype=torch.float64)
    for share in (0.1, 0.5, 0.9):
        threshold = min(0.99, max(0.0, float(torch.quantile(largest, share))))
        wanted = counted(values, threshold)
        assert abs(expected_by_chance(n, dimensions, chain, threshold) - wanted) <= 0.35 + 0.25 * wanted
    assert expected_by_chance(n, dimensions, chain, 0.999999) <= counted(values, 0.999) + FLOAT64


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.85])
@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_expected_number_of_a_pair(n: int, p: int, q: int, threshold: float) -> None:
    assert expected_pair(n, p, q, threshold) == pytest.approx(counted(draws(n, (p, q)), threshold), abs=1.0)


@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_all_of_a_pair_is_above_zero(n: int, p: int, q: int) -> None:
    assert expected_pair(n, p, q, 0.0) == pytest.approx(min(p, q), rel=0.01)
    assert expected_mean_of_pair(n, p, q, 0.0) == pytest.approx(min(p + q, n), rel=0.01)


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize(("n", "p", "q"), [(60, 8, 8), (60, 20, 5), (40, 25, 20)])
def test_expected_number_of_the_mean_of_a_pair(n: int, p: int, q: int, threshold: float) -> None:
    wanted = counted(draws(n, (p, q), "mean", count=40), threshold + 1e-9)
    assert expected_mean_of_pair(n, p, q, threshold) == pytest.approx(wanted, abs=0.4)


@pytest.mark.parametrize(("n", "p", "q"), [(128, 8, 8), (256, 16, 16), (100, 4, 20)])
def test_the_largest_of_a_pair_fluctuates_about_the_edge(n: int, p: int, q: int) -> None:
    """Wachter's law is a limit, in which nothing is beyond the edge. Some of the modules have a direction there."""
    g = generator(3)
    frames = [torch.linalg.qr(torch.randn(300, n, d, generator=g, dtype=torch.float64)).Q for d in (p, q)]
    values = torch.linalg.svdvals(frames[0].mT @ frames[1]).square()
    for factor in (0.9, 1.0, 1.05, 1.2):
        threshold = factor * wachter_edge(n, p, q)
        wanted = sum(bool(v.max() > threshold) for v in values) / len(values)
        assert abs(largest_exceeds(n, p, q, threshold) - wanted) < 0.06
        assert expected_pair(n, p, q, threshold) >= largest_exceeds(n, p, q, threshold)
    assert expected_pair(n, p, q, 2 * wachter_edge(n, p, q)) < 0.001


@pytest.mark.parametrize("chain", CHAINS)
def test_no_draws_beyond_the_edge_lose_nothing(chain: str) -> None:
    """Where nothing is drawn since the threshold is far beyond the edge, no draw is above it."""
    for dimensions in ((4, 4, 4), (5, 10, 20), (30, 30, 30)):
        excluded = [t for t in (0.3, 0.5, 0.7, 0.85, 0.95) if expected_by_chance(100, dimensions, chain, t) == 0.0]
        for threshold in excluded:
            # One draw of all would be a share that the sample may miss.
            assert counted(draws(100, dimensions, chain, count=20), threshold) <= 0.05
        assert excluded or dimensions[0] == 30


@pytest.mark.parametrize("zeros", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
def test_zero_updates(chain: str, zeros: int) -> None:
    """Nothing is shared with them but by a mean, which counts them: ``(1/k) Σ`` over those that are there."""
    for present in ((), (6,), (6, 6), (6, 4, 9)):
        dimensions = (*present, *(0 for _ in range(zeros)))
        if len(dimensions) < 2:
            continue
        values = draws(50, dimensions, chain, count=40)
        largest = [float(v.max()) if v.numel() else 0.0 for v in values]
        edge = chance_edge(50, dimensions, chain)
        assert 0.8 * sum(largest) / 40 - FLOAT64 <= edge <= 1.5 * max(largest) + FLOAT64
        for threshold in (0.01, 0.2, 0.4, 0.7):
            wanted = counted(values, threshold)
            assert abs(expected_by_chance(50, dimensions, chain, threshold) - wanted) <= 0.35 + 0.1 * wanted


def forget() -> None:
    for function in (chance_edge, expected_by_chance, drawn_values):
        function.cache_clear()


def test_samples_are_shared_by_modules_and_do_not_grow_with_the_dimension() -> None:
    """224 modules of a model of nearly the same ranks take few samples, which nothing else seeds."""
    forget()
    torch.manual_seed(1)
    first = [chance_edge(4096, (60 + i % 5, 61, 62 + i % 3), "product") for i in range(224)]
    assert drawn_values.cache_info().misses <= 6
    assert drawn_values(10**6, (16, 16, 16), "product").numel() == drawn_values(100, (16, 16, 16), "product").numel()
    forget()
    torch.manual_seed(2)
    with fl.use_backend("reference"):  # what is forced for adapters is not forced here
        assert [chance_edge(4096, (60 + i % 5, 61, 62 + i % 3), "product") for i in range(224)] == first


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", CHAINS)
def test_reports_have_the_edge_of_their_chain_and_side(chain: str, side: str) -> None:
    parts = [(torch.randn(60, r, generator=generator(r)), torch.randn(r, 90, generator=generator(9 + r)), 1.0)
             for r in (4, 6, 3)]  # fmt: skip
    row = fl.decompose(make_pool(parts), 0.9, chain=chain, side=side).report.rows[0]
    n = 60 if side == "left" else 90
    assert row.chance_edge == chance_edge(n, (4, 6, 3), chain) > 0
    assert row.expected_by_chance == expected_by_chance(n, (4, 6, 3), chain, 0.9)
