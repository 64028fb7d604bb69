"""Methods on inner products: weights of every module by itself, and the exact sum with them."""

from __future__ import annotations

from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Extra
from fastlora.errors import NonFiniteError
from fastlora.merging.forms import weights

RULE = weights.method(summary="an example", source="this test")


def equal_norms(inner: Tensor, *, norm: float = 1.0) -> Tensor:
    """Every update at the same norm, and twice what points as the first one does.

    Args:
        norm: of every update
    """
    norms = inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    shares = torch.where(norms > 0, norm / norms, 0.0)
    return shares * (1 + (inner[:, :, 0] > 0))


def by_definition(matrices: Tensor, norm: float = 1.0) -> Tensor:
    """:func:`equal_norms` of dense matrices ``[k, n, m]``."""
    total = torch.zeros_like(matrices[0])
    for matrix in matrices:
        size = float(matrix.norm())
        if size > 0:
            total += (1 + bool((matrix * matrices[0]).sum() > 0)) * norm / size * matrix
    return total


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_every_module_has_its_own_weights(dtype: torch.dtype | None) -> None:
    pool = mixed.mixed_pool(dtype=dtype)
    with mixed.registered(RULE, equal_norms) as name:
        merged = fl.merge(pool, mixed.WEIGHTS, method=name, norm=3.0)
    assert merged.modules == pool.modules and merged.name == name
    assert merged.provenance["parameters"] == {"norm": 3.0}
    for module in pool.modules:
        expected = by_definition(mixed.dense(pool, module, mixed.WEIGHTS), 3.0)
        # Gram blocks are summed in float64, float32 factors in float32 products at most: eight digits of a norm.
        assert mixed.distance(merged, module, expected) <= 1e-7
        counted = [u for u in (a.updates[module] for a in pool.adapters if module in a) if u.rank]
        assert merged.updates[module].rank <= sum(u.rank for u in counted)


@pytest.mark.parametrize("kind", pools.POOLS)
def test_float64_pools(kind: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    with mixed.registered(RULE, equal_norms) as name:
        merged = fl.merge(pool, method=name)
        cut = fl.merge(pool, method=name, rank=2)
    expected = by_definition(mixed.dense(pool, MODULE))
    assert mixed.distance(merged, MODULE, expected) <= 1e-12  # sums of a few hundred float64 terms
    sigma = torch.linalg.svdvals(expected)
    assert cut.updates[MODULE].rank == 2 and cut.name == "equal_norms"
    kept = float(sigma[:2].square().sum() / sigma.square().sum())
    assert cut.provenance["retained_energy"] == pytest.approx(kept, abs=1e-9)
    assert mixed.distance(cut, MODULE, mixed.truncated(expected, 2)) <= 1e-6 or float(sigma[1] - sigma[2]) < 1e-3


def test_weights_of_zero_and_gaps() -> None:
    """Adapters that count nothing are not part of the sum; a module of none is there with rank 0."""
    pool = mixed.mixed_pool()
    with mixed.registered(RULE, equal_norms) as name:
        merged = fl.merge(pool, {"half": 2.0}, method=name)
    assert [merged.updates[m].rank for m in ("wide", "tall", "small")] == [1, 2, 0]


def test_what_belongs_to_a_module_takes_its_weights() -> None:
    """Biases of a module are changed as its update is; replaced values cannot be."""
    pool = mixed.mixed_pool(dtype=torch.float64)

    def biased(kind: Any, key: str) -> fl.Pool:
        return fl.Pool(
            fl.Adapter(a.name, a.updates, extras={key: Extra(kind, torch.full((2,), i + 1.0))} if i < 3 else {})
            for i, a in enumerate(pool.adapters)
        )

    with mixed.registered(RULE, equal_norms) as name:
        merged = fl.merge(biased("delta", "wide.lora_bias"), method=name)
        matrices = mixed.dense(pool, "wide")
        wanted = sum(
            (i + 1.0) * (1 + bool((x * matrices[0]).sum() > 0)) / float(x.norm())
            for i, x in enumerate(matrices[:3])
            if float(x.norm())
        )
        assert merged.extras["wide.lora_bias"].tensor.tolist() == pytest.approx([wanted] * 2, rel=1e-6)  # float32
        with pytest.raises(fl.InputError, match=r"'first' changes head.bias, which belongs to no .*--drop-extras"):
            fl.merge(biased("delta", "head.bias"), method=name)
        for key in ("head.weight", "wide.other"):
            with pytest.raises(fl.InputError, match=f"replaces {key} of its base model"):
                fl.merge(biased("value", key), method=name)


def wrong(inner: Tensor) -> Tensor:
    return inner


def undefined(inner: Tensor) -> Tensor:
    return inner[:, 0] / 0.0


def test_what_is_refused() -> None:
    pool = pools.make_pool(pools.planted(3))
    with (
        mixed.registered(RULE, wrong) as name,
        pytest.raises(TypeError, match=r"\[1, 3\] is needed, not .* \[1, 3, 3\]"),
    ):
        fl.merge(pool, method=name)
    with (
        mixed.registered(RULE, undefined) as name,
        pytest.raises(fl.InputError, match=f"{MODULE} is too large or not finite"),
    ):
        fl.merge(pool, method=name)
    bad = pools.planted(3)
    bad[2][0][0, 0] = torch.inf
    with mixed.registered(RULE, equal_norms) as name:
        with pytest.raises(NonFiniteError, match=f"adapter 'a2': lora_B of {MODULE} holds NaN or Inf"):
            fl.merge(pools.make_pool(bad), method=name)
        with pytest.raises(fl.InputError, match="the weighted updates overflow: lower the weights"):
            fl.merge(pool, {"a0": 1e200}, method=name)
        with pytest.raises(fl.InputError, match="rank=0 must be at least 1"):
            fl.merge(pool, method=name, rank=0)
