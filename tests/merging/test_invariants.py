"""What every merge method promises, whatever the pool: properties over all that are registered.

Another factorisation of the same updates, another order, or an adapter of weight 0 change nothing. Of one adapter, and
of copies of one, comes what :data:`ONE` and :data:`COPIES` say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mixed
import pools
import pytest
import torch
from builders import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32

import fastlora as fl

# Rank and energy of the methods that cut are such that nothing is cut.
WHOLE = {"energy": 1.0}
PARAMETERS: dict[str, dict[str, Any]] = {"svd": WHOLE, "iso_c": WHOLE, "iso_cts": WHOLE, "ctm": {"rank": 3}}
NAMES = [name for name, method in fl.methods().items() if method.needs == "adapters"]
GAUGE_BOUND = ("pem",)  # elementwise on the factors
OF_TWO = ("slerp",)
EQUAL_RANKS = ("pem",)

ONE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("cat", "sum", "mean", "matched_norm", "equal_energy", "metagpt", "model_stock", "pem")},
    **{name: {} for name in ("multislerp", "karcher", "tsv", "pico", "svc", "cart", "wudi")},
    "svd": WHOLE, "star": {"keep": 1.0}, "ties": {"density": 1.0, "rank": 99},
    "core": {"density": 1.0}, "knots": {"density": 1.0}, "ctm": {"density": 1.0, "rank": 99},
}  # fmt: skip
"""Methods that leave one adapter of weight 1 as it is, and with which parameters."""

COPIES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("mean", "matched_norm", "equal_energy", "metagpt", "model_stock", "pem", "star"), ("1", {})),
    **dict.fromkeys(("multislerp", "karcher", "tsv", "svc", "cart", "core", "knots"), ("1", {})),
    "ctm": ("1", {"rank": 3}), "ties": ("1", {"rank": 99}), "wudi": ("1", {"towards": "zero"}),
    "cat": ("k", {}), "sum": ("k", {}), "svd": ("k", WHOLE), "iso_c": ("k", WHOLE),
}  # fmt: skip
"""Methods for which ``k`` copies give what one adapter gives, or ``k`` times that."""

few = settings(max_examples=5, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10**6)


def parameters_of(name: str) -> dict[str, Any]:
    """With which a method can be called."""
    method = fl.methods()[name]
    needed = {p.name: 0.5 for p in method.parameters.values() if p.required}
    return needed | PARAMETERS.get(name, {"rank": 99} if method.form == "tiles" else {})


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[list[fl.Adapter], dict[str, float]]:
    """A pool of two modules with ragged ranks and gaps, and weights."""
    seed, count = draw(seeds), 2 if name in OF_TWO else draw(st.integers(2, 4))
    shapes = {"q": (draw(st.integers(9, 14)), draw(st.integers(8, 13))), "v": (8, 9)}
    adapters = []
    for i in range(count):
        parts = {}
        for j, (module, (n, m)) in enumerate(shapes.items()):
            rank = 2 if name in EQUAL_RANKS else draw(st.integers(1, 4))
            if module == "q" or name in EQUAL_RANKS or draw(st.booleans()):
                B, A = (gaussian(*s, seed=seed + 10 * i + j, dtype=torch.float64) for s in ((n, rank), (rank, m)))
                parts[module] = (B, A + 0.3, 1.0 if name in EQUAL_RANKS else draw(st.sampled_from((0.5, 1.0, -2.0))))
        adapters.append(pools.make_adapter(f"a{i}", parts))
    # No two alike, none zero, no sum of zero.
    weights = draw(st.permutations((1.0, 0.6, -0.3, 1.7)))
    return adapters, {a.name: w for a, w in zip(adapters, weights, strict=False)}


def merged(adapters: Sequence[fl.Adapter], weights: dict[str, float], name: str, **parameters: Any) -> fl.Adapter:
    return fl.merge(fl.Pool(adapters), weights, method=name, **{**parameters_of(name), **parameters})


def require_same(one: fl.Adapter, two: fl.Adapter, factor: float = 1.0) -> None:
    assert sorted(one.modules) == sorted(two.modules)
    for module in one.modules:
        expected = factor * pools.exact(two.updates[module])
        error = float((pools.exact(one.updates[module]) - expected).norm())
        assert error <= FLOAT32 * max(1.0, float(expected.norm())), module


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GAUGE_BOUND])
@few
@given(data=st.data())
def test_another_factorisation_changes_nothing(name: str, data: st.DataObject) -> None:
    """``(B X, X⁻¹ A)``, ``X`` of condition 10, and another scaling."""
    adapters, weights = data.draw(cases(name))
    moved = []
    for i, adapter in enumerate(adapters):
        parts = {}
        for module, update in adapter.updates.items():
            B, A = (f.terms[0].source for f in (update.B, update.A))
            X = pools.mixing(update.rank, 50 * i + 7, 10.0)
            parts[module] = (0.25 * B @ X, torch.linalg.inv(X) @ A, 4 * update.scaling)
        moved.append(pools.make_adapter(adapter.name, parts))
    require_same(merged(moved, weights, name), merged(adapters, weights, name))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OF_TWO])
@few
@given(data=st.data())
def test_the_order_changes_nothing(name: str, data: st.DataObject) -> None:
    adapters, weights = data.draw(cases(name))
    require_same(merged(data.draw(st.permutations(adapters)), weights, name), merged(adapters, weights, name))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OF_TWO])
@few
@given(data=st.data())
def test_an_adapter_of_weight_zero_is_not_there(name: str, data: st.DataObject) -> None:
    """It only keeps a module in the result, without an update."""
    adapters, weights = data.draw(cases(name))
    weights = {**weights, adapters[-1].name: 0.0}
    others = adapters[:-1]
    whole, less = merged(adapters, weights, name), merged(others, {a.name: weights[a.name] for a in others}, name)
    for module in whole.modules:
        if module in less:
            expected = pools.exact(less.updates[module])
            assert mixed.distance(whole, module, expected) <= FLOAT32, module
        else:
            assert not pools.exact(whole.updates[module]).any()


@pytest.mark.parametrize("name", ONE)
@few
@given(data=st.data())
def test_one_adapter_stays(name: str, data: st.DataObject) -> None:
    adapters, _ = data.draw(cases(name))
    require_same(fl.merge(fl.Pool(adapters[:1]), method=name, **ONE[name]), adapters[0])


@pytest.mark.parametrize("name", COPIES)
@few
@given(data=st.data())
def test_copies_of_one_adapter(name: str, data: st.DataObject) -> None:
    (adapter, *_), _ = data.draw(cases(name))
    count = data.draw(st.integers(2, 4))
    times, parameters = COPIES[name]
    copies = [fl.Adapter(f"a{i}", adapter.updates, dtype=adapter.dtype) for i in range(count)]
    of_copies, of_one = (fl.merge(fl.Pool(p), method=name, **parameters) for p in (copies, copies[:1]))
    require_same(of_copies, of_one, {"1": 1.0, "k": float(count)}[times])


@pytest.mark.parametrize("name", [n for n in NAMES if "rule" in fl.methods()[n].parameters])
@few
@given(data=st.data())
def test_a_linear_rule_in_a_container_is_the_sum(name: str, data: st.DataObject) -> None:
    adapters, weights = data.draw(cases(name))
    whole = {"rank": 99} if name == "ctm" else {}
    require_same(merged(adapters, weights, name, rule="sum", **whole), merged(adapters, weights, "cat"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_gives_nothing(name: str) -> None:
    """Untrained adapters, whose ``B`` is zero."""
    parts = [(torch.zeros(9, 2), gaussian(2, 7, seed=i), 1.0) for i in range(2)]
    found = fl.merge(pools.make_pool(parts), method=name, **parameters_of(name))
    assert not pools.exact(found.updates[pools.MODULE]).any()
