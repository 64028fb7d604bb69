"""Cuts of matrices that are given by tiles, against dense singular value decompositions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from builders import gaussian
from tolerances import GRAM64, HALF, SUMS32
from torch import Tensor

from fastlora.adapters.differences import DifferenceMatrix
from fastlora.engine import low_rank as module
from fastlora.engine.low_rank import LowRank, low_rank
from fastlora.engine.tile_source import DenseMatrix, StackedMatrix, ZeroMatrix
from fastlora.errors import NonFiniteError

pytestmark = pytest.mark.portable

LIMIT = 1.01
"""The error of a cut at two power rounds, of the least possible."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range finder on small matrices, in several tiles."""
    monkeypatch.setattr(module, "EXACT_SIDE", 0)
    monkeypatch.setattr("fastlora.engine.tile_source.TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr("fastlora.engine.sweeps.COMPUTED_ELEMENTS", 1 << 13)


def noisy(n: int, m: int, rank: int, noise: float) -> Tensor:
    """A matrix of low rank and noise of the given size, relative to it."""
    planted = gaussian(n, rank, seed=1, dtype=torch.float64) @ gaussian(rank, m, seed=2, dtype=torch.float64)
    other = gaussian(n, m, seed=3, dtype=torch.float64)
    return planted / planted.norm() + noise * other / other.norm()


def error(found: LowRank, matrix: Tensor) -> float:
    return float((found.left @ found.right - matrix).norm())


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("noise", [0.3, 1e-2])
@pytest.mark.parametrize("exact", [False, True])
def test_the_error_is_near_the_least_and_known(shape: tuple[int, int], noise: float, exact: bool) -> None:
    matrix = noisy(*shape, 12, noise)
    sigma = torch.linalg.svdvals(matrix)
    found = low_rank(DenseMatrix(matrix), 12, None, key="0:w", exact=exact)
    least = float(sigma[12:].norm())
    assert error(found, matrix) <= (1 + 1e-6 if exact else LIMIT) * least
    assert found.error == pytest.approx(error(found, matrix), rel=SUMS32)
    assert found.total == pytest.approx(float(matrix.square().sum()), rel=GRAM64) and found.is_exact == exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noise", [0.3, 3e-2, 8e-3])
def test_differences_of_stored_weights(dtype: torch.dtype, noise: float) -> None:
    """Around the share of the rest below which float64 measures it; one model has more rows."""
    change = 100 * noisy(300, 200, 12, noise)
    old = (0.02 * gaussian(300, 200, seed=4)).to(dtype)
    new = (old.double() + change).to(dtype)
    matrix = new.double() - old.double()
    least = float(torch.linalg.svdvals(matrix)[12:].norm())
    found = low_rank(DifferenceMatrix(old, torch.cat([new, new])), 12, None, key="0:w")
    assert error(found, matrix) <= LIMIT * least
    assert found.error == pytest.approx(error(found, matrix), rel=SUMS32)
    matrix[250:] = 0
    found = low_rank(DifferenceMatrix(old, new[:250]), 12, None, key="0:w")
    assert error(found, matrix) <= LIMIT * float(torch.linalg.svdvals(matrix)[12:].norm())
    assert not found.left[250:].any()


def test_differences_of_rare_dtypes() -> None:
    """What the op does not read is read by tiles."""
    change = 100 * noisy(300, 200, 12, 0.3)
    old = (0.02 * gaussian(300, 200, seed=4)).to(torch.float8_e5m2)
    new = change.to(torch.float8_e5m2)
    matrix = new.double() - old.double()
    found = low_rank(DifferenceMatrix(old, new), 12, None, key="0:w")
    assert error(found, matrix) <= LIMIT * float(torch.linalg.svdvals(matrix)[12:].norm())
    assert found.error == pytest.approx(error(found, matrix), rel=SUMS32)


@pytest.mark.parametrize("size", [1e-38, 1e-15, 1e15, 1e40])
def test_any_size(size: float) -> None:
    """Up to where float32's own products overflow, and down to its subnormal numbers."""
    matrix = (size * noisy(300, 200, 12, 0.3)).float()
    found = low_rank(DenseMatrix(matrix), 12, None, key="0:w")
    least = float(torch.linalg.svdvals(matrix.double())[12:].norm())
    assert error(found, matrix.double()) <= LIMIT * least


class Computed:
    """A matrix that is not stored."""

    precise = torch.float32

    def __init__(self, matrix: Tensor) -> None:
        self._dense = DenseMatrix(matrix)
        self.shape = self._dense.shape

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        return self._dense.tile(rows, columns, out)

    def stored(self) -> None:
        return None

    def release(self) -> None:
        pass


def test_what_is_computed_by_tiles(threads: Callable[[int], None]) -> None:
    matrix = noisy(700, 200, 12, 0.3).float()
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(low_rank(Computed(matrix), 12, None, key="0:w"))
        assert torch.equal(found[0].left, found[-1].left) and torch.equal(found[0].right, found[-1].right)
    dense = low_rank(DenseMatrix(matrix), 12, None, key="0:w")
    assert error(found[0], dense.left @ dense.right) <= 0.3 * HALF
    both = StackedMatrix([DenseMatrix(matrix), Computed(matrix)])
    twice = low_rank(both, 12, None, key="0:w")
    assert error(twice, torch.cat([matrix, matrix]).double()) <= LIMIT * 2**0.5 * float(
        torch.linalg.svdvals(matrix.double())[12:].norm()
    )


def test_exact_low_rank_is_found_to_rounding() -> None:
    matrix = noisy(300, 200, 9, 0.0)
    found = low_rank(DenseMatrix(matrix), 20, None, key="0:w")
    assert len(found.sigma) == 9 and error(found, matrix) <= GRAM64


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_the_rank_grows_until_the_energy_is_kept(energy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.engine.range_finder.FIRST_BLOCK", 4)
    matrix = noisy(300, 200, 30, 0.6)
    sigma = torch.linalg.svdvals(matrix)
    found = low_rank(DenseMatrix(matrix), None, energy, key="0:w")
    assert error(found, matrix) ** 2 <= (1 - energy) * found.total + GRAM64
    least = int((sigma.square().cumsum(0) < energy * float(sigma.square().sum()) * (1 - GRAM64)).sum()) + 1
    assert least <= len(found.sigma) <= math.ceil(1.1 * least) + 1


def test_any_number_of_threads_gives_the_same_bits() -> None:
    matrix = noisy(700, 500, 12, 0.3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(low_rank(DenseMatrix(matrix), 12, None, key="0:w"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r.left, results[0].left) and torch.equal(r.right, results[0].right) for r in results)


def test_the_key_decides_the_random_numbers() -> None:
    matrix = noisy(300, 200, 40, 0.6)
    one, two = (low_rank(DenseMatrix(matrix), 8, None, key=key).left for key in ("0:w", "1:w"))
    assert not torch.equal(one, two)


def test_parts_below_each_other_and_zeros() -> None:
    matrix = noisy(200, 150, 5, 0.0)
    stacked = StackedMatrix([DenseMatrix(matrix[:70]), ZeroMatrix((30, 150)), DenseMatrix(matrix[70:])])
    whole = torch.cat([matrix[:70], torch.zeros(30, 150, dtype=torch.float64), matrix[70:]])
    assert error(low_rank(stacked, 5, None, key="0:w"), whole) <= GRAM64
    nothing = low_rank(ZeroMatrix((200, 150)), 5, None, key="0:w")
    assert len(nothing.sigma) == 0 and nothing.total == 0.0


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite_is_refused(exact: bool) -> None:
    matrix = noisy(300, 200, 5, 0.1)
    matrix[250, 3] = math.nan
    with pytest.raises(NonFiniteError):
        low_rank(DenseMatrix(matrix), 5, None, key="0:w", exact=exact)
