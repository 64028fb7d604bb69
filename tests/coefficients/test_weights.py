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


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_adapter_has_no_weight_and_changes_no_other(method: str) -> None:
    parts = pools.cast(pools.with_zero(3), torch.float32)
    found = vector(pools.make_pool(parts), method)
    assert float(found[1]) == 0.0
    rest = vector(pools.make_pool([parts[0], parts[2]]), method)
    if method != "matched_norm":  # whose mean norm counts every adapter
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
