"""Weights from Gram blocks against their objectives on dense matrices."""

from __future__ import annotations

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE
from test_poolgram import counted, ragged_pool
from tolerances import FLOAT64, GRAM64, SUBSPACE64
from torch import Tensor

import fastlora as fl

METHODS = ("equal_energy", "matched_norm", "least_interference")


def deltas(pool: fl.Pool) -> dict[str, list[Tensor]]:
    """Dense ``ΔW_i`` by module, zero where an adapter lacks it."""
    found = {}
    for module in pool.modules:
        shape = next(a.updates[module].shape for a in pool.adapters if module in a)
        zero = torch.zeros(shape, dtype=torch.float64)
        found[module] = [pools.exact(a.updates[module]) if module in a else zero for a in pool.adapters]
    return found


def interference(pool: fl.Pool, w: Tensor) -> Tensor:
    """The objective of the docstring, written down on dense matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for own in deltas(pool).values():
        merged = sum(x * y for x, y in zip(w, own, strict=True))
        total = total + sum(((merged - d) @ d.mT).square().sum() / d.square().sum() for d in own if d.any())
    return total


def vector(pool: fl.Pool, method: str) -> Tensor:
    return torch.tensor(list(fl.weights(pool, method).values()), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_least_interference_minimises_the_objective(dtype: torch.dtype) -> None:
    pool = ragged_pool(dtype)
    w = vector(pool, "least_interference").requires_grad_()
    value = interference(pool, w)
    value.backward()
    assert w.grad is not None
    scale = float(interference(pool, torch.zeros_like(w)).detach())
    assert float(w.grad.abs().max()) <= SUBSPACE64 * scale
    for other in (torch.ones(3), torch.full((3,), 1 / 3), torch.zeros(3)):
        assert float(value.detach()) < float(interference(pool, other.double()))


def test_equal_energy_and_matched_norm() -> None:
    pool = ragged_pool()
    norms = torch.stack([torch.stack([x.square().sum() for x in own]) for own in deltas(pool).values()]).sum(0).sqrt()
    w = vector(pool, "equal_energy")
    assert float(w.sum()) == pytest.approx(1.0) and float((w * norms).std() / (w * norms).mean()) < FLOAT64
    merged = fl.merge(pool, fl.weights(pool, "matched_norm"), method="cat")
    norm = sum(float(pools.exact(u).square().sum()) for u in merged.updates.values()) ** 0.5
    assert norm == pytest.approx(float(norms.mean()), rel=GRAM64)
    assert len(set(vector(pool, "matched_norm").tolist())) == 1


def test_orthogonal_row_spaces_do_not_interfere() -> None:
    pool = pools.make_pool(pools.transposed(pools.orthogonal(3)))
    torch.testing.assert_close(vector(pool, "least_interference"), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_duplicates_share_the_weight(k: int) -> None:
    pool = pools.make_pool(pools.cast(pools.identical(k), torch.float32))
    for method in METHODS:
        torch.testing.assert_close(
            vector(pool, method), torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=SUBSPACE64
        )


def equations(parts: list[pools.Part]) -> tuple[Tensor, Tensor]:
    """The normal equations of the objective on dense matrices."""
    deltas = [pools.dense(p) for p in parts]
    matrix, right = torch.zeros(len(deltas), len(deltas), dtype=torch.float64), torch.zeros(len(deltas)).double()
    for own in deltas:
        norm = float(own.norm())
        if norm > 0:
            across = torch.stack([(other @ own.mT / norm).flatten() for other in deltas])
            matrix += across @ across.mT
            right += across @ (own @ own.mT / norm).flatten()
    return matrix, right


DEPENDENT = {
    "equal": [(0, 1.0), (0, 1.0), (1, 1.0)],
    "twice": [(0, 1.0), (0, 2.0), (1, 1.0)],
    "turned": [(0, 1.0), (0, -8.0), (1, 1.0)],
    "tiny": [(0, 1.0), (0, 1e-6), (1, 1.0)],
    "huge": [(0, 1.0), (0, 1e6), (1, 1e6)],
    "two pairs": [(0, 1.0), (0, 3.0), (1, 1.0), (1, -0.2)],
    "three of one": [(0, 1.0), (0, 0.1), (0, 10.0)],
    "beside a zero adapter": [(0, 1.0), (0, 4.0), (1, 0.0), (2, 1.0)],
}


@pytest.mark.parametrize("multiples", DEPENDENT.values(), ids=DEPENDENT)
def test_of_equally_good_weights_the_shortest(multiples: list[tuple[int, float]]) -> None:
    originals = pools.cast(pools.planted(3), torch.float64)
    parts = [(originals[i][0] * factor, originals[i][1], originals[i][2]) for i, factor in multiples]
    found = vector(pools.make_pool(parts), "least_interference")
    matrix, right = equations(parts)
    sizes = torch.tensor([matrix[i, i].sqrt() for i in range(len(parts))])
    residual = (matrix @ found - right) / sizes.clamp(min=1e-300)
    assert float(residual.norm()) <= SUBSPACE64 * float((right / sizes.clamp(min=1e-300)).nan_to_num().norm())
    for i in {i for i, _ in multiples}:
        members = [j for j, (k, _) in enumerate(multiples) if k == i]
        factors = torch.tensor([multiples[j][1] for j in members], dtype=torch.float64)
        if factors.any():  # least Σw² with Σ c w given: w ∝ c
            share = found[members] @ factors / factors.square().sum()
            torch.testing.assert_close(
                found[members], share * factors, rtol=1e-6, atol=SUBSPACE64 * float(found.norm())
            )


def test_the_shortest_weights_of_a_sum_and_its_terms() -> None:
    """One adapter is the sum of two others: one move of weights changes nothing; the shortest is orthogonal to it."""
    a, b = pools.cast(pools.planted(2), torch.float64)
    one, two = pools.make_adapter("a", {MODULE: a}), pools.make_adapter("b", {MODULE: b})
    total = fl.Adapter.weighted_sum([(1.0, one), (7.0, two)], "total")
    w = vector(fl.Pool([one, two, total]), "least_interference")
    move = torch.tensor([1.0, 7.0, -1.0], dtype=torch.float64)
    assert abs(float(w @ move)) <= SUBSPACE64 * float(w.norm() * move.norm())


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_adapter_has_no_weight_and_changes_no_other(method: str) -> None:
    parts = pools.cast(pools.with_zero(3), torch.float32)
    found = vector(pools.make_pool(parts), method)
    assert float(found[1]) == 0.0
    rest = vector(pools.make_pool([parts[0], parts[2]]), method)
    torch.testing.assert_close(found[[0, 2]], rest)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_huge_and_tiny_updates(scale: float) -> None:
    parts = pools.cast(pools.planted(3), torch.float64)
    scaled = [(b * scale, a, s) for b, a, s in parts]
    for method in METHODS:
        torch.testing.assert_close(
            vector(pools.make_pool(scaled), method), vector(pools.make_pool(parts), method), rtol=SUBSPACE64, atol=0
        )


def test_messages() -> None:
    zero = pools.make_pool([(torch.zeros(5, 2), gaussian(2, 4, seed=1), 1.0)])
    for method in METHODS:
        with pytest.raises(fl.InputError, match="every update of the pool is zero"):
            fl.weights(zero, method)
    with pytest.raises(fl.InputError, match="'best' does not exist: use one of equal_energy"):
        fl.weights(zero, "best")
    b, a, s = pools.planted(1)[0]
    with pytest.raises(fl.InputError, match="cancel each other"):
        fl.weights(pools.make_pool([(b, a, s), (-b, a, s)]), "matched_norm")


def test_a_pool_gram_spares_the_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ragged_pool()
    expected = {m: fl.weights(pool, m) for m in METHODS}
    gram = fl.PoolGram(pool)
    with counted(monkeypatch) as reads:
        assert {m: fl.weights(gram, m) for m in METHODS} == expected
    assert not reads and MODULE in gram.pool.modules
