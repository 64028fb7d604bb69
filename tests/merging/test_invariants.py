"""What every merge method promises, whatever the pool: properties over all that are registered.

What does not hold for a method stands in :data:`EXCEPT` with its reason, and in docs/methods.md; it is tested that it
does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32

import fastlora as fl
from fastlora.merging.input_rows import InputRows, Statistics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

EXCEPT: dict[str, dict[str, str]] = {
    "gauge": {
        "pem": "sums the stored factors",
        "ssr": "λ is added to a matrix of the stored rows; without it nothing depends on them",
    },
    "order": {"slerp": "goes from the first adapter to the second"},
    "weight 0": {
        "slerp": "needs two adapters",
        "regmean": "asks for an output of 0 on that adapter's inputs",
        "ssr": "asks for an output of 0 on that adapter's inputs",
    },
    "one": {
        "iso_c": "makes the spectrum flat",
        "iso_cts": "makes the spectrum flat",
        "slerp": "needs two adapters",
    },
    "copies": {"pico": "damps directions by their share of the energy, more for more copies"},
}
"""``{property: {method: why it does not have it}}``."""

WHOLE: dict[str, dict[str, Any]] = {
    "svd": {"energy": 1.0}, "iso_c": {"energy": 1.0}, "iso_cts": {"energy": 1.0, "common": 1.0},
    "core": {"density": 1.0}, "knots": {"density": 1.0}, "ctm": {"density": 1.0, "rank": 99}, "star": {"keep": 1.0},
    "ties": {"density": 1.0}, "magnitude": {"density": 1.0}, "dare": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0}, "della": {"density": 1.0, "epsilon": 0.0},
    "regmean": {"ridge": 1e-12}, "ssr": {"ridge": 1e-12},
}  # fmt: skip
"""Parameters with which nothing is trimmed or cut."""
OF_COPIES_ALONE: dict[str, dict[str, Any]] = {"wudi": {"towards": "zero"}}
"""More for copies: the ridge draws to their sum by default."""
OF_COPIES: Mapping[str, str] = dict.fromkeys(
    ("cat", "sum", "svd", "iso_c", "iso_cts", "magnitude", "breadcrumbs", "dare"), "k"
)
"""Methods for which ``k`` copies give ``k`` times one adapter; of others they give that adapter once."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "svd": {"energy": 1.0}, "iso_c": {"energy": 1.0}, "iso_cts": {"energy": 1.0}, "ctm": {"rank": 3},
    "slerp": {"t": 0.3},
}  # fmt: skip
OF_TWO = ("slerp",)
EQUAL_RANKS = ("pem",)

few = settings(max_examples=5, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10**6)


def having(name: str) -> list[str]:
    """The methods that have a property."""
    return [method for method in fl.methods() if method not in EXCEPT[name]]


def parameters_of(name: str) -> dict[str, Any]:
    """With which a method can be called."""
    method = fl.methods()[name]
    needed = {p.name: 0.5 for p in method.parameters.values() if p.required}
    return needed | PARAMETERS.get(name, {"rank": 99} if method.form == "tiles" else {})


def whole_parameters_of(name: str) -> dict[str, Any]:
    return parameters_of(name) | WHOLE.get(name, {})


def data_of(adapters: Sequence[fl.Adapter], name: str, shared: bool = False) -> Statistics | None:
    """Inputs that span all that there are: others for every adapter, or the same for all."""
    if not fl.methods()[name].takes_data:
        return None
    groups = {}
    for i, adapter in enumerate(sorted(adapters, key=lambda a: a.name)):
        seed = 0 if shared else 100 * i
        rows = {m: gaussian(40, u.shape[1], seed=seed + j) for j, (m, u) in enumerate(sorted(adapter.updates.items()))}
        groups[adapter.name] = InputRows(rows, {m: m for m in rows}, dict.fromkeys(rows, 40))
    return Statistics(groups)


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


def merged(adapters: Sequence[fl.Adapter], weights: Mapping[str, float], name: str, **parameters: Any) -> fl.Adapter:
    given = {**parameters_of(name), **parameters}
    return fl.merge(fl.Pool(adapters), weights, method=name, data=data_of(adapters, name), **given)


def distance(one: fl.Adapter, two: fl.Adapter, factor: float = 1.0) -> float:
    """Of all modules of ``one``, which the other may lack where there is nothing: relative, absolute below 1."""
    worst = 0.0
    for module, update in one.updates.items():
        found = pools.exact(update)
        expected = factor * pools.exact(two.updates[module]) if module in two else torch.zeros_like(found)
        worst = max(worst, float((found - expected).norm()) / max(1.0, float(expected.norm())))
    return worst


Drawn = Callable[[Any], Any]


def of_another_gauge(draw: Drawn, name: str) -> float:
    """``(B X, X⁻¹ A)``, ``X`` of condition 10, and another scaling."""
    adapters, weights = draw(cases(name))
    moved = []
    for i, adapter in enumerate(adapters):
        parts = {}
        for module, update in adapter.updates.items():
            B, A = (f.terms[0].source for f in (update.B, update.A))
            X = pools.mixing(update.rank, 50 * i + 7, 10.0)
            parts[module] = (0.25 * B @ X, torch.linalg.inv(X) @ A, 4 * update.scaling)
        moved.append(pools.make_adapter(adapter.name, parts))
    return distance(merged(moved, weights, name), merged(adapters, weights, name))


def of_another_order(draw: Drawn, name: str) -> float:
    adapters, weights = draw(cases(name))
    return distance(merged(draw(st.permutations(adapters)), weights, name), merged(adapters, weights, name))


def without_weight(draw: Drawn, name: str) -> float:
    """An adapter of weight 0 only keeps a module in the result, without an update."""
    adapters, weights = draw(cases(name))
    weights = {**weights, adapters[-1].name: 0.0}
    others = adapters[:-1]
    whole, less = merged(adapters, weights, name), merged(others, {a.name: weights[a.name] for a in others}, name)
    return distance(whole, less)


def of_one(draw: Drawn, name: str) -> float:
    """One adapter of weight 1 stays, where nothing is trimmed."""
    adapters, _ = draw(cases(name))
    return distance(merged(adapters[:1], {adapters[0].name: 1.0}, name, **whole_parameters_of(name)), adapters[0])


def of_copies(draw: Drawn, name: str) -> float:
    (adapter, *_), _ = draw(cases(name))
    count = 2 if name in OF_TWO else draw(st.integers(2, 4))
    copies = [fl.Adapter(f"a{i}", adapter.updates, dtype=adapter.dtype) for i in range(count)]
    given, data = whole_parameters_of(name) | OF_COPIES_ALONE.get(name, {}), data_of(copies, name, shared=True)
    found = fl.merge(fl.Pool(copies), method=name, data=data, **given)
    one = adapter if name in OF_TWO else fl.merge(fl.Pool(copies[:1]), method=name, data=data, **given)
    return distance(found, one, float(count) if OF_COPIES.get(name) == "k" else 1.0)


PROPERTIES: dict[str, Callable[[Drawn, str], float]] = {
    "gauge": of_another_gauge,
    "order": of_another_order,
    "weight 0": without_weight,
    "one": of_one,
    "copies": of_copies,
}
"""How far a method is from having a property, in one case."""


@pytest.mark.parametrize(("name", "method"), [(name, m) for name in PROPERTIES for m in having(name)])
@few
@given(data=st.data())
def test_it_holds(name: str, method: str, data: st.DataObject) -> None:
    assert PROPERTIES[name](data.draw, method) <= FLOAT32


@pytest.mark.parametrize(("name", "method"), [(name, m) for name, some in EXCEPT.items() for m in some])
def test_an_exception_is_one(name: str, method: str) -> None:
    """In some case it does not hold, or the method refuses it."""

    def is_one(data: st.DataObject) -> bool:
        try:
            return PROPERTIES[name](data.draw, method) > FLOAT32
        except fl.InputError as refused:
            return "goes between two adapters" in str(refused)

    find(st.data(), is_one, settings=settings(few, max_examples=30, phases=[Phase.generate]))


def test_the_page_has_the_exceptions() -> None:
    """One row a property, with the methods that lack it."""
    table = PAGE.read_text(encoding="utf-8").partition("| property | what it means | but for |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    told = {row[0]: set(re.findall(r"`(\w+)`:", row[2])) for row in rows}
    assert {name: told[name] for name in EXCEPT} == {name: set(methods) for name, methods in EXCEPT.items()}


@pytest.mark.parametrize("name", [n for n, m in fl.methods().items() if "rule" in m.parameters])
@few
@given(data=st.data())
def test_a_linear_rule_in_a_container_is_the_sum(name: str, data: st.DataObject) -> None:
    adapters, weights = data.draw(cases(name))
    whole = {"rank": 99} if name == "ctm" else {}
    assert distance(merged(adapters, weights, name, rule="sum", **whole), merged(adapters, weights, "cat")) <= FLOAT32


@pytest.mark.parametrize("name", fl.methods())
def test_nothing_gives_nothing(name: str) -> None:
    """Untrained adapters, whose ``B`` is zero."""
    pool = pools.make_pool([(torch.zeros(9, 2), gaussian(2, 7, seed=i), 1.0) for i in range(2)])
    found = merged(pool.adapters, dict.fromkeys(pool.names, 1.0), name)
    assert not pools.exact(found.updates[pools.MODULE]).any()
