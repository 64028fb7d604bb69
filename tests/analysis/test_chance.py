"""What random subspaces share: closed forms against draws."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from builders import generator
from tolerances import FLOAT64

from fastlora.analysis.chance import (
    chain_values,
    chance_edge,
    expected_by_chance,
    expected_pair,
    random_frame,
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


def draws(
    n: int, dimensions: tuple[int, ...], chain: str = "product", count: int = 6, seed: int = 5
) -> list[torch.Tensor]:
    g = generator(seed)
    return [chain_values([random_frame(n, d, g) for d in dimensions], chain) for _ in range(count)]


@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_edge(n: int, p: int, q: int) -> None:
    """The largest eigenvalue of a draw is near the edge, on average below it by about ``n^(−2/3)``."""
    largest = torch.stack([v.max() for v in draws(n, (p, q))])
    assert -0.05 < float(largest.mean()) - wachter_edge(n, p, q) < 0.01
    assert wachter_edge(n, p, q) == pytest.approx(wachter_edge(n, q, p), abs=FLOAT64)


def test_edge_by_hand() -> None:
    assert wachter_edge(100, 10, 10) == pytest.approx(4 * 0.1 * 0.9)
    assert wachter_edge(100, 50, 50) == wachter_edge(100, 70, 60) == wachter_edge(10, 16, 16) == 1.0
    assert wachter_edge(100, 0, 50) == 0.0
    assert chance_edge(100, (5, 10, 3, 10)) == wachter_edge(100, 10, 10)
    assert chance_edge(100, (5,)) == 0.0


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.85])
@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_expected_number_of_a_pair(n: int, p: int, q: int, threshold: float) -> None:
    counted = sum(int((v > threshold).sum()) for v in draws(n, (p, q))) / 6
    assert expected_pair(n, p, q, threshold) == pytest.approx(counted, abs=1.0)


@pytest.mark.parametrize(("n", "p", "q"), PAIRS)
def test_all_of_a_pair_is_above_zero(n: int, p: int, q: int) -> None:
    assert expected_pair(n, p, q, 0.0) == pytest.approx(min(p, q), rel=0.01)


@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
def test_values_are_those_of_the_dense_chain(chain: str) -> None:
    g = generator(1)
    frames = [random_frame(30, d, g) for d in (8, 12, 5)]
    dense = torch.linalg.eigvals(operator([f @ f.mT for f in frames], chain)).real
    above = [int((v > t).sum()) for t in (0.01, 0.1, 0.3) for v in (dense, chain_values(frames, chain))]
    assert above[0::2] == above[1::2] and above[0] > 0


@pytest.mark.parametrize(("chain", "dimensions", "threshold"), [
    ("product", (60, 70, 80), 0.3), ("palindrome", (60, 70, 80), 0.3), ("mean", (60, 70, 80), 0.6),
    ("mean", (60, 70), 0.6),
])  # fmt: skip
def test_expected_number_of_other_chains(chain: str, dimensions: tuple[int, ...], threshold: float) -> None:
    counted = sum(int((v > threshold).sum()) for v in draws(100, dimensions, chain, count=40, seed=8)) / 40
    assert counted > 0.5, "choose a threshold that chance reaches"
    assert expected_by_chance(100, dimensions, chain, threshold) == pytest.approx(counted, abs=1.5)


@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
def test_no_sampling_beyond_the_bound_loses_nothing(chain: str) -> None:
    """Where the bound says zero, no draw is above the threshold."""
    spaces = ((4, 4, 4), (10, 20, 5), (30, 30, 30))
    cases = product(spaces, (0.3, 0.5, 0.7, 0.85, 0.95))
    excluded = [(d, t) for d, t in cases if expected_by_chance(100, d, chain, t) == 0.0]
    assert {dimensions for dimensions, _ in excluded} == set(spaces), "the bound says zero of every kind"
    for dimensions, threshold in excluded:
        # What the bound leaves to fluctuations beyond the limit law.
        assert all(float(v.max()) <= threshold + 0.02 for v in draws(100, dimensions, chain))


@pytest.mark.parametrize("chain", ["product", "palindrome"])
def test_nothing_is_expected_of_a_zero_update(chain: str) -> None:
    assert expected_by_chance(100, (5, 0, 5), chain, 0.1) == 0.0
    assert expected_by_chance(100, (5,), chain, 0.1) == 0.0
