"""Arithmetic of small matrices: bits of a pair, long factors, unbalanced factors, sums that cancel."""

from __future__ import annotations

from collections.abc import Callable

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part, make_adapter
from test_precision import dense, relative
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.factors import Factor
from fastlora.core.updates import Update

HALVES = [torch.float16, torch.bfloat16]
# What is asked of everything here, relative to the largest.
ACCURATE = 1e-6


# ---- half-precision Gram blocks -------------------------------------------------------------------------------------


def half(name: str, n: int, m: int, dtype: torch.dtype, seed: int, rank: int = 8) -> Adapter:
    strength = torch.logspace(0, -2, rank, dtype=torch.float64)
    left = gaussian(n, rank, seed=seed, dtype=torch.float64) * strength @ gaussian(rank, rank, seed=1).double()
    return make_adapter(name, {MODULE: (left.to(dtype), gaussian(rank, m, seed=seed + 1).to(dtype), 1.0)})


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("other", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1500, 60), (60, 1500), (40, 60)], ids=str)
def test_the_bits_of_a_pair_depend_on_the_pair_alone(
    dtype: torch.dtype, other: torch.dtype, shape: tuple[int, int]
) -> None:
    pair = [half("a", *shape, dtype, 1), half("b", *shape, dtype, 3)]
    pool = fl.Pool([*pair, half("c", *shape, other, 5)])
    alone = fl.decompose(fl.Pool(pair), 0.01)
    beside = fl.decompose(pool, 0.01, mode="pairs").pairs["a", "b"]
    assert torch.equal(beside.spectrum[MODULE], alone.spectrum[MODULE])
    inner = fl.overlap(fl.Pool(pair)).cosine
    assert torch.equal(fl.overlap(pool).cosine[:2, :2], inner)
    with fl.PoolGram(pool):
        assert torch.equal(fl.decompose(fl.Pool(pair), 0.01).spectrum[MODULE], alone.spectrum[MODULE])
        assert torch.equal(fl.overlap(fl.Pool(pair)).cosine, inner)
        assert torch.equal(pair[0].compress(3).tensors()[MODULE][0], pair[0].compress(3).tensors()[MODULE][0])
    with fl.PoolGram(pool) as gram:
        cached = pair[0].compress(3).tensors()[MODULE]
    assert all(map(torch.equal, cached, pair[0].compress(3).tensors()[MODULE]))
    assert torch.equal(gram.inner(), fl.PoolGram(pool).inner())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("length", [1000, 1025, 5000])
def test_inner_products_of_half_precision_are_as_good_as_exact(dtype: torch.dtype, rows: bool, length: int) -> None:
    x = gaussian(2, length, 9, seed=length).to(dtype)
    exact = torch.einsum("ina,jnb->ijab", x.double(), x.double())
    found = fl.ops.gram(x.mT.contiguous() if rows else x, rows=rows)
    assert float((found - exact).abs().max() / exact.abs().max()) < FLOAT64


@pytest.mark.parametrize("dtype, condition", [(torch.bfloat16, 100.0), (torch.float16, 900.0)], ids=str)
def test_weak_directions_of_long_factors_are_right(dtype: torch.dtype, condition: float) -> None:
    """The weakest direction of one adapter is a strong one of the other, at an angle."""
    n, m, r = 2000, 50, 6
    sigma = torch.logspace(0, -1, r, base=condition, dtype=torch.float64)
    u, v = pools.orthonormal(n, r, 1), pools.orthonormal(n, r, 2)
    v[:, 0] = 0.95 * u[:, -1] + 0.3 * v[:, 0]
    sides = [(u * sigma @ pools.orthonormal(r, r, 3), 4), (v @ pools.orthonormal(r, r, 5), 6)]
    parts = pools.cast([(40.0 * left, pools.orthonormal(m, r, seed).mT, 1.0) for left, seed in sides], dtype)
    frames = [torch.linalg.svd(pools.dense(p), full_matrices=False)[0][:, :r] for p in parts]
    right = torch.linalg.svdvals(frames[0].mT @ frames[1]).square()
    pool = pools.make_pool(parts)
    found = fl.decompose(pool, 0.5).spectrum[MODULE]
    assert found.shape == right.shape and float((found - right).abs().max()) < ACCURATE
    whole = torch.linalg.svdvals(pools.dense(parts[0]))[:r]
    magnitudes = fl.dipm.decouple(pool["a0"], "component").magnitudes[MODULE]
    assert magnitudes.tolist() == pytest.approx(whole.tolist(), rel=ACCURATE)


# ---- one update in many factorings ----------------------------------------------------------------------------------


def unbalanced(part: Part, power: int, column: int) -> Part:
    left, right, scaling = part
    balance = torch.ones(left.shape[1], dtype=left.dtype)
    balance[column] = 2.0**power
    return left * balance, right / balance[:, None], scaling


def small_part(seed: int) -> Part:
    return gaussian(40, 4, seed=seed), gaussian(4, 32, seed=seed + 1), 0.5


ANSWERS: dict[str, Callable[[fl.Pool], Tensor]] = {
    "compress": lambda pool: dense(pool["a0"].compress(4)),
    "cut": lambda pool: dense(pool["a0"].compress(2)),
    "eigenvalues": lambda pool: fl.decompose(pool, 0.1).spectrum[MODULE],
    "mean": lambda pool: fl.decompose(pool, 0.6, chain="mean").spectrum[MODULE],
    "right": lambda pool: fl.decompose(pool, 0.1, side="right").spectrum[MODULE],
    "shared": lambda pool: dense(fl.decompose(pool, 0.1).shared_of("a0")),
    "unique": lambda pool: dense(fl.decompose(pool, 0.1).unique_of("a1")),
    "overlap": lambda pool: fl.overlap(pool).subspace,
    "columns": lambda pool: fl.dipm.decouple(pool["a0"]).magnitudes[MODULE],
    "columns of a part": lambda pool: fl.dipm.decouple(fl.decompose(pool, 0.1).unique_of("a0")).magnitudes[MODULE],
    "components": lambda pool: fl.dipm.decouple(pool["a0"], "component").magnitudes[MODULE],
    "matrix": lambda pool: fl.dipm.decouple(pool["a0"], "matrix").magnitudes[MODULE],
    "modulated": lambda pool: dense(fl.modulate(pool["a0"], fl.dipm.interpolate(pool["a1"], 0.4))),
    "svd": lambda pool: dense(fl.merge(pool, rank=6)),
    "PoolGram": lambda pool: dense(fl.PoolGram(pool).merge(rank=6)),
    "iso_c": lambda pool: dense(fl.merge(pool, method="iso_c", rank=6)),
    "slerp": lambda pool: dense(fl.merge(pool, method="slerp", rank=6)),
    "weights": lambda pool: torch.tensor(list(fl.weights(pool, "equal_energy").values())),
}


@pytest.mark.parametrize("power", [-40, -25, 12, 20, 24, 30, 50])
@pytest.mark.parametrize("what", ANSWERS)
def test_answers_do_not_depend_on_how_an_update_is_factored(what: str, power: int) -> None:
    parts = [small_part(1), small_part(3)]
    right = ANSWERS[what](pools.make_pool(parts))
    found = ANSWERS[what](pools.make_pool([unbalanced(parts[0], power, 2), parts[1]]))
    assert found.shape == right.shape
    assert relative(found, right.double()) < ACCURATE


@pytest.mark.parametrize("power", [-10, -20, -24, -26, -30, -40])
def test_what_is_lost_to_an_impossible_factoring_is_not_called_kept(power: int) -> None:
    """Rows of ``A`` that differ by less than float64 can tell beside columns of ``B`` that cancel as far."""
    left, right = gaussian(20, 2, seed=1).double(), gaussian(2, 15, seed=2).double()
    mix = torch.tensor([[1.0, 1.0], [0.0, 2.0**power]], dtype=torch.float64)
    part = left @ torch.linalg.inv(mix.mT), mix.mT @ right, 1.0
    cut = make_adapter("a", {MODULE: part}).compress(2)
    kept = 1 - relative(dense(cut), pools.dense(part)) ** 2
    assert float(cut.details["retained_energy"][MODULE]) <= kept + ACCURATE  # type: ignore[index]


# ---- sums that cancel -----------------------------------------------------------------------------------------------


def remainder(small: float, seed: int, cut: int = 2, rank: int = 8) -> tuple[Adapter, Tensor]:
    """An adapter without its largest directions, beside what is left of it."""
    sigma = torch.full((rank,), small, dtype=torch.float64)
    sigma[:cut] = 1.0
    u, v, mix = (pools.orthonormal(n, rank, seed + i) for i, n in enumerate((120, 90, rank)))
    part = pools.cast([(u * sigma.sqrt() @ mix, mix.mT @ (sigma.sqrt()[:, None] * v.mT), 1.0)], torch.float32)[0]
    whole = make_adapter("x", {MODULE: part})
    left, s, right = torch.linalg.svd(pools.dense(part), full_matrices=False)
    return whole - whole.compress(cut), (left[:, cut:rank] * s[cut:rank]) @ right[cut:rank]


@pytest.mark.parametrize("small", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_a_sum_that_cancels_is_no_direction(small: float, seed: int) -> None:
    rest, right = remainder(small, 10 * seed)
    other = make_adapter("y", {MODULE: (gaussian(120, 8, seed=1), gaussian(8, 90, seed=2), 1.0)})
    pool = fl.Pool([Adapter("rest", rest.updates), other])
    assert fl.decompose(pool, 0.45, chain="mean").report.rows[0].directions == (6, 8)
    frames = [torch.linalg.svd(x, full_matrices=False)[0] for x in (right, dense(other))]
    overlap = float((frames[0][:, :6].mT @ frames[1][:, :8]).square().sum()) / 6
    assert float(fl.overlap(pool).subspace[0, 1]) == pytest.approx(overlap, rel=ACCURATE)
    assert len(fl.dipm.decouple(pool["rest"], "component").magnitudes[MODULE]) == 6
    assert rest.compress(8).update(MODULE).rank == 6


def test_nothing_is_left_of_an_adapter_without_itself() -> None:
    a = make_adapter("a", {MODULE: small_part(1)})
    assert (a - a).compress(4).update(MODULE).rank == 0
    twin = Adapter("b", {MODULE: Update(Factor.of("B", small_part(1)[0]), Factor.of("A", small_part(1)[1]), 0.5)})
    for merged in (fl.merge, lambda pool, w, **k: fl.PoolGram(pool).merge(w, **k)):
        assert merged(fl.Pool([a, twin]), {"a": 1.0, "b": -1.0}, rank=4).update(MODULE).rank == 0
    assert relative(dense((a - 0.5 * twin).compress(4)), 0.5 * dense(a)) < FLOAT32
