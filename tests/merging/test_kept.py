"""What a cut keeps of every adapter, against dense projections; and that every method that cuts is known to."""

from __future__ import annotations

import math
from typing import Any

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32, GRAM64

import fastlora as fl
from fastlora.merging.kept import kept_of_each, was_cut, with_kept


@pytest.mark.parametrize("kind", pools.POOLS)
def test_what_is_kept_of_each(kind: str) -> None:
    pool = pools.make_pool(pools.POOLS[kind](3))
    merged = fl.merge(pool, {"a0": 1.0, "a1": 1.0, "a2": -0.5}, rank=3)
    U, _, Vt = torch.linalg.svd(pools.exact(merged.updates[MODULE]), full_matrices=False)
    count = merged.updates[MODULE].rank
    U, Vt = U[:, :count], Vt[:count]
    found = kept_of_each(pool, merged)
    for name, delta in zip(pool.names, mixed.dense(pool, MODULE), strict=True):
        size = float(delta.square().sum())
        expected = float((U.mT @ delta @ Vt.mT).square().sum()) / size if size else math.nan
        assert found[name] == pytest.approx(expected, abs=GRAM64, nan_ok=True)


def test_all_is_kept_of_a_sum_that_is_not_cut() -> None:
    """Of several modules, gaps and a rank of 0; an adapter of the result's name."""
    pool = mixed.mixed_pool()
    renamed = fl.Pool([fl.Adapter("merged" if a.name == "half" else a.name, a.updates) for a in pool.adapters])
    kept = kept_of_each(renamed, fl.merge(renamed, method="cat"))
    assert math.isnan(kept.pop("zero")) and kept == pytest.approx(dict.fromkeys(kept, 1.0), rel=FLOAT32)


CUT_BY_DEFAULT = ("svd", "iso_c", "iso_cts", "ctm")


@pytest.mark.parametrize("method", [n for n, m in fl.methods().items() if m.needs == "adapters"])
def test_a_cut_is_known(method: str) -> None:
    """Of every method that takes a rank, with one and without."""
    record = fl.methods()[method]
    pool = pools.make_pool(pools.planted(2))
    given: dict[str, Any] = {p.name: 0.5 for p in record.parameters.values() if p.required}
    if "rank" in record.parameters:
        less = {"min_energy": 0.0} if "min_energy" in record.parameters else {}
        merged, found = with_kept(pool, fl.merge(pool, method=method, rank=2, **given, **less))
        assert merged.provenance["retained_energy_by_adapter"] == found
        assert set(found) == {"a0", "a1"} and all(0 < share < 1 for share in found.values())
    if record.form != "tiles":
        assert was_cut(fl.merge(pool, method=method, **given)) == (method in CUT_BY_DEFAULT)


def test_nothing_is_measured_where_nothing_is_cut() -> None:
    pool = pools.make_pool(pools.planted(2))
    merged = fl.merge(pool, method="cat")
    assert with_kept(pool, merged) == (merged, {})
