"""What similarities say: neighbours, families, duplicates, outliers."""

from __future__ import annotations

import math

import numpy as np
import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.analysis.similar import Overlap

MODULE = "layers.0.q"


def planted(families: int = 3, members: int = 4, alone: int = 3) -> Overlap:
    adapters = []
    for f in range(families):
        B, A = gaussian(30, 4, seed=f, dtype=torch.float32), gaussian(4, 20, seed=50 + f, dtype=torch.float32)
        for i in range(members):
            own = gaussian(30, 4, seed=100 + 10 * f + i, dtype=torch.float32)
            adapters.append(pools.make_adapter(f"f{f}-{i}", {MODULE: (B + 0.2 * own, A, 1.0)}))
    for i in range(alone):
        B, A = gaussian(30, 4, seed=200 + i, dtype=torch.float32), gaussian(4, 20, seed=300 + i, dtype=torch.float32)
        adapters.append(pools.make_adapter(f"z{i}", {MODULE: (B, A, 1.0)}))
    return fl.overlap(fl.Pool(adapters))


def matrix(cosine: list[list[float]], norms: list[float], bases: dict[str, str] | None = None) -> Overlap:
    names = [f"a{i}" for i in range(len(norms))]
    table = torch.tensor(cosine, dtype=torch.float64)
    return Overlap(names, table, table.clone(), torch.tensor(norms, dtype=torch.float64), {}, (), bases or {})


def test_families_are_found() -> None:
    found = planted()
    clusters = found.clusters()
    assert [len(c.names) for c in clusters] == [4, 4, 4, 1, 1, 1]
    for f, cluster in enumerate(clusters[:3]):
        assert set(cluster.names) == {f"f{f}-{i}" for i in range(4)} and cluster.center in cluster.names
        index = torch.tensor([found.names.index(n) for n in cluster.names])
        pairs = found.cosine[index[:, None], index][torch.ones(4, 4, dtype=torch.bool).triu(1)]
        assert cluster.within == pytest.approx(float(pairs.mean())) and cluster.least == float(pairs.min())
    assert math.isnan(clusters[-1].within)
    assert [len(found.clusters(n)) for n in (1, 2, 15)] == [1, 2, 15]
    assert sorted(found.order()) == list(range(15))
    for f in range(3):  # members of a family are neighbours in the order of the leaves
        places = sorted(found.order().index(found.names.index(f"f{f}-{i}")) for i in range(4))
        assert places[-1] - places[0] == 3


@pytest.mark.parametrize("n", [0, 16])
def test_a_number_of_families_out_of_range(n: int) -> None:
    with pytest.raises(fl.InputError, match="1 to 15"):
        planted().clusters(n)


def test_neighbours() -> None:
    found = planted()
    assert {row.name for row in found.nearest("f1-2", 3)} == {"f1-0", "f1-1", "f1-3"}
    cosines = [row.cosine for row in found.nearest("f1-2", 100)]
    assert len(cosines) == 14 and cosines == sorted(cosines, reverse=True)
    assert found.nearest("f1-2", 0) == []
    with pytest.raises(fl.InputError, match="no adapter 'x'"):
        found.nearest("x")
    lonely = matrix([[1, math.nan], [math.nan, 1]], [1, 1])
    assert lonely.nearest("a0") == [] and len(lonely.clusters()) == 2


def test_duplicates_say_what_they_stand_on() -> None:
    B, A = gaussian(30, 4, seed=1, dtype=torch.float32), gaussian(4, 20, seed=2, dtype=torch.float32)
    adapters = [pools.make_adapter(n, {MODULE: (B, A, s)}) for n, s in (("one", 1.0), ("twice", 2.0), ("minus", -1.0))]
    adapters.append(pools.make_adapter("other", {MODULE: (B.flip(0), A, 1.0)}))
    (pair,) = fl.overlap(fl.Pool(adapters)).duplicates()
    assert (pair.first, pair.second) == ("one", "twice")
    assert pair.cosine == pytest.approx(1) and pair.ratio == pytest.approx(2)
    many = [pools.make_adapter(f"a{i}", {MODULE: (B, A, 1.0 + i)}) for i in range(36)]
    assert len(fl.overlap(fl.Pool(many)).duplicates(1.0)) == 36 * 35 // 2
    for above in (0.0, 1.1, math.nan):
        with pytest.raises(fl.InputError, match="above="):
            planted().duplicates(above)


def test_outliers() -> None:
    alike = [[1.0 if i == j else 0.1 for j in range(6)] for i in range(6)]
    bases = {f"a{i}": "org/model" for i in range(5)} | {"a5": "org/other"}
    found = matrix(alike, [1.0, 1.1, 0.9, 50.0, 0.0, 1.0], bases).outliers()
    assert [(row.name, row.reason.split()[0]) for row in found] == [("a4", "changes"), ("a3", "norm"), ("a5", "names")]
    assert found[1].norm == 50.0 and found[1].median == 1.0 and "50 times larger" in found[1].reason
    assert "org/other" in found[2].reason and "org/model" in found[2].reason
    assert matrix(alike, [1.0, 1.01, 0.99, 1.02, 1.0, 1.0]).outliers() == []


def test_arrays() -> None:
    found = planted().arrays()
    assert found["cosine"].shape == (15, 15) and found["names"].dtype.kind == "U" and "modules" not in found
    both = fl.overlap(
        fl.Pool([pools.make_adapter(n, {MODULE: p}) for n, p in zip("ab", pools.planted(2), strict=True)]), modules=True
    )
    assert both.arrays()["cosine_by_module"].shape == (1, 2, 2)
    assert isinstance(both.arrays()["subspace"], np.ndarray)
