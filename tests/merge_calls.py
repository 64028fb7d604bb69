"""Calls of every merge method of the registry on one pool, for what has to hold for all of them."""

from __future__ import annotations

from typing import Any

from builders import gaussian

import fastlora as fl
from fastlora.merging.input_rows import InputRows, Statistics

OF_TWO = ("slerp",)
OF_EQUALS = ("pem",)
"""Methods that need equal modules, ranks and scalings."""
WEIGHTS = (0.7, -0.2, 1.1, 0.9)
CUT = {"svd": {"rank": 3}, "iso_c": {"rank": 3}, "iso_cts": {"rank": 3}, "ctm": {"rank": 2}}


def parameters_of(name: str) -> dict[str, Any]:
    """With which a method can be called, and cuts where it has to."""
    method = fl.methods()[name]
    needed = {p.name: 0.5 for p in method.parameters.values() if p.required}
    return needed | CUT.get(name, {"rank": 3, "min_energy": 0.0} if method.form == "tiles" else {})


def data_of(name: str, pool: fl.Pool) -> Statistics | None:
    """Inputs of all modules, where a method uses them."""
    if not fl.methods()[name].takes_data:
        return None
    groups = {}
    for i, adapter in enumerate(pool.adapters):
        rows = {m: gaussian(9, u.shape[1], seed=10 * i + j) for j, (m, u) in enumerate(adapter.updates.items())}
        groups[adapter.name] = InputRows(rows, {m: m for m in rows}, dict.fromkeys(rows, 9))
    return Statistics(groups)


def called(name: str, pool: fl.Pool, **more: Any) -> fl.Adapter:
    """The merge of a pool by a method; of a pool of any size the first two adapters where it takes no more."""
    if name in OF_TWO:
        pool = pool.subset(pool.names[:2])
    weights = dict(zip(pool.names, WEIGHTS, strict=False))
    return fl.merge(pool, weights, method=name, data=data_of(name, pool), **parameters_of(name), **more)
