"""Methods on factors; ``cat`` with the bits of a sum of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mixed
import pools
import pytest
import torch
from pools import MODULE

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.sums import sum_updates
from fastlora.core.updates import Layout, Update
from fastlora.errors import NonFiniteError
from fastlora.merging.forms import factors

RULE = factors.method(summary="an example", source="this test")

Terms = Sequence[tuple[float, Update]]


def alternating(terms: Terms, *, start: int = 1) -> Update:
    """``Σ ± w_i ΔW_i``.

    Args:
        start: the first sign
    """
    return sum_updates([(w * start * (-1) ** i, u) for i, (w, u) in enumerate(terms)])


def narrow(terms: Terms) -> Update:
    return replace(terms[0][1], B=terms[0][1].A)


def convolved(terms: Terms) -> Update:
    return replace(terms[0][1], layout=Layout("embedding"))


def test_a_program_sees_the_adapters_that_have_the_module() -> None:
    pool = mixed.mixed_pool()
    with mixed.registered(RULE, alternating) as name:
        merged = fl.merge(pool, mixed.WEIGHTS, method=name, start=-1)
    assert merged.modules == pool.modules and merged.dtype == torch.float32
    for module in pool.modules:
        present = mixed.dense(pool, module, mixed.WEIGHTS)[pool.present(module)]
        signs = torch.tensor([-((-1.0) ** i) for i in range(len(present))], dtype=torch.float64)
        # One rounding of every element of a factor to float64, and as many of the product.
        assert mixed.distance(merged, module, (signs[:, None, None] * present).sum(0)) <= 1e-13


@pytest.mark.parametrize("weights", [None, mixed.WEIGHTS, {"half": 2.0}, {}], ids=str)
def test_cat_has_the_bits_of_the_sum(weights: dict[str, float] | None) -> None:
    pool = mixed.mixed_pool()
    merged = fl.merge(pool, weights, method="cat")
    given = dict.fromkeys(pool.names, 1.0 if weights is None else 0.0) | (weights or {})
    total = Adapter.weighted_sum([(given[n], pool[n]) for n in pool.names])
    for module in pool.modules:
        one, two = merged.updates[module], total.updates[module]
        assert one.rank == two.rank and one.scaling == two.scaling and one.noise == two.noise
        assert torch.equal(pools.exact(one), pools.exact(two))
    assert merged.name == "cat" and merged.base == total.base and merged.dtype == total.dtype
    assert merged.provenance["of"] == [{"weight": given[n], "of": {"adapter": n}} for n in pool.names]


@pytest.mark.parametrize("program", [narrow, convolved])
def test_updates_of_another_module_are_refused(program: object) -> None:
    with mixed.registered(RULE, program) as name, pytest.raises(TypeError, match=f"{MODULE} it returns an update of"):  # type: ignore[arg-type]
        fl.merge(pools.make_pool(pools.planted(2)), method=name)


def test_nan_is_refused_by_name() -> None:
    bad = pools.planted(2)
    bad[1][1][0, 0] = torch.nan
    for method in ("cat", "pem"):
        with pytest.raises(NonFiniteError, match=f"adapter 'a1': lora_A of {MODULE} holds NaN or Inf"):
            fl.merge(pools.make_pool(bad), method=method)
