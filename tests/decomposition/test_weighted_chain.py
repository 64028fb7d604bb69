"""Chains weighted by energy and soft thresholds, against dense projectors in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.analysis.chance import chance_edge
from fastlora.errors import InputError
from fastlora.reference.devec import Dense, devec

MADE = {
    name: pools.POOLS[name] for name in ("planted", "ragged", "with_zero", "scalings", "deficient_left", "duplicates")
}
BAR = 1e-6


def compare(parts: fl.Decomposition, dense: Dense, deltas: list[Tensor], bar: float) -> None:
    result = parts.components.results[MODULE]
    assert result.count == len(dense.taken)
    largest = max(float(d.norm()) for d in deltas)
    assert float((pools.exact(parts.shared.update(MODULE)) - dense.merged).norm()) <= bar * largest
    for i, name in enumerate(parts.pool.names):
        shared, unique = (pools.exact(f(name).update(MODULE)) for f in (parts.shared_of, parts.unique_of))
        assert float((shared - dense.shared[i]).norm()) <= bar * largest
        assert float((unique - dense.unique[i]).norm()) <= bar * largest
        assert result.shared_norms[i] == pytest.approx(float(dense.shared[i].norm()), abs=bar * largest)
        row = parts.report.rows[0]
        if float(deltas[i].norm()) > 0:
            kept = float(dense.unique[i].norm() / deltas[i].norm())
            assert row.norm_kept[name] == pytest.approx(kept, abs=1e-4)  # of squares, one minus the other
    torch.testing.assert_close(torch.tensor(row.taken).double(), dense.taken, rtol=0, atol=bar)


@pytest.mark.parametrize("pool", MADE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
def test_weighted_by_energy(chain: str, side: str, pool: str) -> None:
    for k, rho in ((2, 0.01), (3, 0.3)):
        made = pools.cast(MADE[pool](k), torch.float32)
        deltas = [pools.dense(p) for p in made]
        settings: dict[str, Any] = {"chain": chain, "side": side}
        values = devec(deltas, 0.5, rho=rho, **settings).values
        for threshold, gap in pools.thresholds(values, most=1):
            parts = fl.decompose(pools.make_pool(made), threshold, weighting="energy", rho=rho, **settings)
            compare(parts, devec(deltas, threshold, rho=rho, **settings), deltas, 10 * BAR / gap)


@pytest.mark.parametrize("pool", MADE)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["palindrome", "mean"])
@pytest.mark.parametrize("rho", [None, 0.05])
def test_a_soft_threshold(rho: float | None, chain: str, side: str, pool: str) -> None:
    made = pools.cast(MADE[pool](3), torch.float32)
    deltas = [pools.dense(p) for p in made]
    weighting: dict[str, Any] = {} if rho is None else {"weighting": "energy", "rho": rho}
    parts = fl.decompose(pools.make_pool(made), "soft", chain=chain, side=side, **weighting)
    result = parts.components.results[MODULE]
    edge = chance_edge(deltas[0].shape[0 if side == "left" else 1], result.kept, chain)
    dense = devec(deltas, chain=chain, side=side, rho=rho or 0.0, edge=edge)
    compare(parts, dense, deltas, 10 * BAR)
    assert parts.report.rows[0].chance_edge == edge and any("Soft threshold" in n for n in parts.report.notices)


def test_what_is_soft_and_weighted_is_saved_and_told(tmp_path: Path) -> None:
    made = pools.cast(pools.planted(3), torch.float32)
    parts = fl.decompose(pools.make_pool(made), "soft", chain="mean", weighting="energy")
    parts.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())["reports"][0]
    assert (report["settings"]["threshold"], report["settings"]["weighting"], report["settings"]["rho"]) == (
        "soft", "energy", 0.01,
    )  # fmt: skip
    assert len(report["rows"][0]["taken"]) == report["rows"][0]["shared"] > 0
    for place, part in parts.adapters().items():
        read = fl.load(tmp_path / "out" / place)
        assert float((read.delta(MODULE) - part.delta(MODULE)).norm()) <= FLOAT32 * float(part.delta(MODULE).norm())


def test_a_weak_direction_has_no_equal_vote() -> None:
    """One direction is strong in both adapters, another one strong in the first and weak in the second."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(32, 2)).Q, torch.linalg.qr(torch.randn(24, 4)).Q
    made = [(U * torch.tensor([1.0, 1.0]), V[:, :2].mT, 1.0), (U * torch.tensor([1.0, 0.01]), V[:, 2:].mT, 1.0)]
    pool = pools.make_pool(made)
    assert fl.decompose(pool).report.rows[0].shared == 2
    weighted = fl.decompose(pool, weighting="energy")
    assert weighted.report.rows[0].shared == 1
    expected = [1.01**-2, 0.0001 / 0.0101 / 1.01]
    assert weighted.report.rows[0].eigenvalues == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": "soft"}, "needs a symmetric chain"),
        ({"threshold": "hard", "chain": "mean"}, r"threshold='hard': give a number .* or 'soft'"),
        ({"weighting": "inputs"}, "weighting='inputs' does not exist: use 'energy'"),
        ({"rho": 0.1}, "rho belongs to weighting"),
        ({"weighting": "energy", "rho": 0.0}, "rho=0.0: must be a finite number above 0"),
        ({"weighting": "energy", "rho": float("nan")}, "rho=nan"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fl.decompose(pools.make_pool(pools.planted(2)), **given)


@pytest.mark.parametrize("options", [{"threshold": "soft"}, {"weighting": "energy"}], ids=["soft", "energy"])
def test_no_number_of_threads_changes_bits(options: dict[str, Any], threads: Callable[[int], None]) -> None:
    """Of matrices that are large enough for LAPACK to share the work."""
    common, pairs = gaussian(300, 33, seed=1), range(8)
    tensors = [(common + 0.02 * gaussian(300, 33, seed=2 + i), gaussian(33, 300, seed=20 + i)) for i in pairs]
    pool = fl.Pool([fl.Adapter.from_tensors({"q": tensors[i]}, name=f"a{i}") for i in pairs])
    found = []
    for count in (1, 2, 3):
        threads(count)
        parts = fl.decompose(pool, chain="mean", **{"threshold": 0.5, **options})
        found.append((parts.spectrum["q"], *parts.shared.tensors()["q"]))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
