"""No parameter of a method is without effect: it changes the result, or is refused beside those that make it idle."""

from __future__ import annotations

import itertools
from typing import Any

import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.merging.input_rows import InputRows, Statistics

MODULES = {"q": (9, 8), "v": (7, 10)}
BASE: dict[str, Any] = {"density": 0.5, "rank": 3}
"""Where a method needs one, or would not show another parameter."""
OTHERS: dict[str, tuple[Any, Any]] = {
    "density": (0.5, 0.75), "rank": (2, 1), "energy": (1.0, 0.1), "seed": (0, 1), "iterations": (10, 0),
    "tolerance": (1e-6, 0.9), "t": (0.5, 0.2), "epsilon": (0.15, 0.05), "gamma": (0.01, 0.2), "select_topk": (1.0, 0.4),
    "share": (0.04, 0.6), "strength": (1.0, 0.7), "alpha": (0.1, 0.9), "keep": (0.4, 1.0), "ridge": (0.1, 0.3),
    "off_diagonal": (0.95, 0.5), "balance": (0.25, 1.0), "common": (0.8, 0.3),
}  # fmt: skip
"""Two values of every parameter that is a number."""
NO_EFFECT = {
    "min_energy": "only refuses",
}


def pool(count: int) -> fl.Pool:
    adapters = []
    for i in range(count):
        parts = {
            m: ((gaussian(n, 3, seed=9 * i + j) + 1.0) * (i + 1), gaussian(3, k, seed=90 + 9 * i + j) + 1.0, 1.0)
            for j, (m, (n, k)) in enumerate(MODULES.items())
        }
        adapters.append(pools.make_adapter(f"a{i}", parts))
    return fl.Pool(adapters)


POOL, TWO = pool(3), pool(2)
DATA = Statistics({
    name: InputRows({m: gaussian(6, k, seed=300 + 7 * i + j) for j, (m, (_, k)) in enumerate(MODULES.items())},
                    {m: m for m in MODULES}, dict.fromkeys(MODULES, 6))
    for i, name in enumerate(POOL.names)
})  # fmt: skip


def result(method: str, given: dict[str, Any]) -> torch.Tensor:
    data = DATA if fl.methods()[method].takes_data else None
    more = {"min_energy": 0.0} if "min_energy" in fl.methods()[method].parameters else {}
    some = TWO if method == "slerp" else POOL
    last = 0.8 if method == "model_stock" else -0.8  # of updates that point apart, that leaves nothing
    merged = fl.merge(
        some, dict(zip(some.names, (1.0, 0.6, last), strict=False)), method=method, data=data, **{**more, **given}
    )
    return torch.cat([pools.exact(merged.updates[m]).flatten() for m in MODULES])


@pytest.mark.parametrize("method", fl.methods())
def test_every_parameter_changes_the_result_or_is_refused(method: str) -> None:
    record = fl.methods()[method]
    words = {p.name: p.choices for p in record.parameters.values() if p.choices}
    needed = [p.name for p in record.parameters.values() if p.required]
    cut = ["rank"] if record.form == "tiles" or method == "ctm" else []
    cut += ["density"] if "density" in record.parameters else []
    for name, parameter in record.parameters.items():
        if name in NO_EFFECT:
            continue
        values = parameter.choices or OTHERS[name]
        others = {w: c for w, c in words.items() if w != name}
        for chosen in itertools.product(*others.values()):
            given = dict(zip(others, chosen, strict=True)) | {n: BASE[n] for n in {*needed, *cut} - {name}}
            if name == "energy":
                given.pop("rank", None)
            if name in record.idle(_values(record, given)):
                given = _without_idle(record, given)
                with pytest.raises(fl.InputError, match=f"{name} has no effect with "):
                    result(method, {**given, name: values[0]})
                continue
            found = [result(method, _without_idle(record, {**given, name: value})) for value in values]
            assert any(not torch.equal(found[0], x) for x in found[1:]), f"{method}: {name} does nothing with {given}"


def _without_idle(record: Any, given: dict[str, Any]) -> dict[str, Any]:
    idle = record.idle(_values(record, given))
    return {n: v for n, v in given.items() if n not in idle}


def _values(record: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {n: p.default for n, p in record.parameters.items()} | given


def test_what_is_refused_says_why() -> None:
    for method in ("core", "knots", "ctm"):
        with pytest.raises(
            fl.InputError, match=f"method '{method}': density has no effect with rule=sum; leave it out"
        ):
            fl.merge(POOL, method=method, rule="sum", density=0.5)
        with pytest.raises(fl.InputError, match="seed has no effect with rule=ties"):
            fl.merge(POOL, method=method, seed=3)
    told = fl.merge(POOL, method="ctm", rule="sum").provenance["parameters"]
    assert isinstance(told, dict) and set(told) == {"rank", "rule", "balance", "iterations", "tolerance"}
