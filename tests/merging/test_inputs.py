"""Merge methods that use inputs, against their dense definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mixed
import pools
import pytest
import tolerances
import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.errors import InputError
from fastlora.merging.forms.inputs import dense
from fastlora.merging.input_rows import InputRows, Statistics

COUNTS = (5, 40, 17, 64, 5)
FEW = (1, 2, 1, 2, 1)
"""Rows of every adapter: more than there are inputs in all, and fewer."""


def statistics(pool: Pool, *, seed: int = 0, shared: bool = False, counts: Sequence[int] = COUNTS) -> Statistics:
    """Random inputs with a mean and unequal columns, of other counts for every adapter, or the same for all."""
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, InputRows] = {}
    for count, adapter in zip(counts, pool.adapters, strict=False):
        rows = {}
        for module, update in adapter.updates.items():
            m = update.shape[1]
            x = torch.randn(count, m, generator=generator) * torch.rand(m, generator=generator) + 0.3
            x[:, 0] = 0.0  # an input that is never used
            rows[module] = x
        groups[adapter.name] = InputRows(rows, {m: m for m in rows}, {m: count for m in rows})
    if shared:
        first = max(groups.values(), key=lambda g: len(g.rows))
        groups = {a.name: replace(first, sites={m: m for m in first.rows}) for a in pool.adapters}
    return Statistics(groups)


def products(pool: Pool, module: str, data: Statistics, gamma: float) -> Tensor:
    """``C_i`` of the adapters that have the module, float64 ``[k, m, m]``."""
    found = []
    for i in pool.present(module):
        x = data.of[pool.names[i]].rows[module].double()
        C = x.mT @ x / len(x)
        found.append(gamma * C + (1 - gamma) * torch.diag(C.diagonal()))
    return torch.stack(found)


def regmean(
    pool: Pool, module: str, data: Statistics, gamma: float, ridge: float, weights: Mapping[str, float] = mixed.WEIGHTS
) -> Tensor:
    """On dense covariances."""
    C = products(pool, module, data, gamma)
    total = C.sum(0)
    rho = ridge * float(total.diagonal().mean())
    updates = mixed.dense(pool, module, weights)[pool.present(module)]
    return (updates @ C).sum(0) @ torch.linalg.inv(total + rho * torch.eye(len(total), dtype=torch.float64))


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.5, 0.0])
@pytest.mark.parametrize("ridge", [1e-6, 1e-1])
@pytest.mark.parametrize("counts", [COUNTS, FEW], ids=["many", "few"])
def test_regmean_is_its_dense_definition(counts: Sequence[int], gamma: float, ridge: float) -> None:
    pool = mixed.mixed_pool()
    data = statistics(pool, counts=counts)
    merged = fl.merge(pool, mixed.WEIGHTS, method="regmean", data=data, off_diagonal=gamma, ridge=ridge)
    for module in pool.modules:
        expected = regmean(pool, module, data, gamma, ridge)
        # The result's A is rounded to float32; with γ = 1 the smallest eigenvalue of S is ρ, 1e-6 of the largest.
        assert mixed.distance(merged, module, expected) <= tolerances.FLOAT32, module
        assert merged.updates[module].rank == sum(pool.adapters[i].updates[module].rank for i in pool.present(module))


def ssr(
    pool: Pool, module: str, data: Statistics, ridge: float, weights: Mapping[str, float] = mixed.WEIGHTS
) -> Tensor:
    """On the stacked factors that are stored."""
    present = pool.present(module)
    updates = [pool.adapters[i].updates[module] for i in present]
    A = torch.cat([dense(u.A) for u in updates])
    G, Q, at = torch.zeros(len(A), len(A), dtype=torch.float64), torch.zeros(len(A), len(A)).double(), 0
    left = []
    for i, update in zip(present, updates, strict=True):
        name = pool.names[i]
        x = data.of[name].rows[module].double()
        product = A @ x.mT @ x @ A.mT / len(x)
        G += product
        Q[at : at + update.rank] = weights[name] * product[at : at + update.rank]
        at += update.rank
        left.append(pools.exact(replace(update, A=_identity(update.rank))))
    lam = ridge * float(G.diagonal().mean())
    router = Q @ torch.linalg.inv(G + lam * torch.eye(len(A), dtype=torch.float64))
    return torch.cat(left, 1) @ router @ A


def test_ssr_is_its_dense_definition() -> None:
    pool = mixed.mixed_pool()
    data = statistics(pool)
    merged = fl.merge(pool, mixed.WEIGHTS, method="ssr", data=data, ridge=1e-3)
    for module in pool.modules:
        assert mixed.distance(merged, module, ssr(pool, module, data, 1e-3)) <= tolerances.GRAM64, module


def _identity(rank: int):  # type: ignore[no-untyped-def]
    from fastlora.core.factors import Factor

    return Factor.of("A", torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("method", ["regmean", "ssr"])
def test_outputs_on_disjoint_inputs_are_kept_and_equal_inputs_give_the_mean(method: str) -> None:
    parts = [{"m": mixed.part("wide", 3, seed, torch.float32)} for seed in (1, 50)]
    pool = Pool([pools.make_adapter(name, p) for name, p in zip("ab", parts, strict=True)])
    x = torch.randn(200, 31, generator=torch.Generator().manual_seed(0))
    left, right = x.clone(), x.clone()
    left[:, 15:], right[:, :15] = 0, 0
    options = {"off_diagonal": 1.0, "ridge": 1e-9} if method == "regmean" else {"ridge": 1e-9}
    apart = Statistics({n: InputRows({"m": r}, {"m": "m"}) for n, r in (("a", left), ("b", right))})
    merged = fl.merge(pool, method=method, data=apart, **options)
    total = mixed.dense(pool, "m")
    if method == "regmean":  # every output is as its adapter has it
        W = pools.exact(merged.updates["m"])
        for rows, update in ((left, total[0]), (right, total[1])):
            expected = rows.double() @ update.mT
            assert float((rows.double() @ W.mT - expected).norm() / expected.norm()) <= tolerances.FLOAT32
    alike = Statistics({n: InputRows({"m": x}, {"m": "m"}) for n in "ab"})
    merged = fl.merge(pool, method=method, data=alike, **options)
    # ρ and λ are 1e-9 of the mean; A was rounded to float32.
    assert mixed.distance(merged, "m", total.mean(0)) <= tolerances.FLOAT32


@pytest.mark.parametrize("method", ["regmean", "ssr"])
def test_a_module_without_inputs_or_updates_is_zero(method: str) -> None:
    pool = Pool(
        [pools.make_adapter(n, {"m": mixed.part("small", 2, s, torch.float32)}) for n, s in (("a", 1), ("b", 9))]
    )
    data = Statistics({n: InputRows({"m": torch.zeros(4, 7)}, {"m": "m"}) for n in "ab"})
    assert not bool(pools.exact(fl.merge(pool, method=method, data=data).updates["m"]).any())


def test_statistics_that_do_not_fit_are_refused() -> None:
    pool = mixed.mixed_pool()
    data = statistics(pool)
    with pytest.raises(InputError, match="needs the inputs"):
        fl.merge(pool, method="regmean")
    with pytest.raises(InputError, match="uses no statistics"):
        fl.merge(pool, method="svd", data=data)
    with pytest.raises(InputError, match="lack half"):
        fl.merge(pool, method="ssr", data=Statistics({n: r for n, r in data.of.items() if n != "half"}))
    first = data.of["first"]
    short = replace(first, rows={**first.rows, "wide": first.rows["wide"][:, 1:]})
    with pytest.raises(InputError, match="inputs of length 30 for 'wide'"):
        fl.merge(pool, method="regmean", data=Statistics({**data.of, "first": short}))
    without = replace(first, sites={m: s for m, s in first.sites.items() if m != "wide"})
    with pytest.raises(InputError, match="'first' lack module 'wide'"):
        fl.merge(pool, method="regmean", data=Statistics({**data.of, "first": without}))
    with pytest.raises(InputError, match="off_diagonal=2"):
        fl.merge(pool, method="regmean", data=data, off_diagonal=2.0)
    with pytest.raises(InputError, match="ridge=0"):
        fl.merge(pool, method="ssr", data=data, ridge=0.0)
