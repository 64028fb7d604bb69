"""The numbers of a report, and every warning by a pool that deserves it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from tolerances import WEAK64

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.data import Extra
from fastlora.decomposition import result
from fastlora.decomposition.devec import LaterNorms
from fastlora.decomposition.report import Report
from fastlora.reference.devec import devec


def report(parts: list[Part], threshold: float = 0.85, **settings: object) -> Report:
    return fl.decompose(pools.make_pool(pools.cast(parts, torch.float32)), threshold, **settings).report  # type: ignore[arg-type]


def warned(found: Report, text: str) -> bool:
    hits = [w for w in found.warnings if text in w]
    assert len(hits) <= 1
    return bool(hits)


def common_start(k: int) -> list[Part]:
    """One random ``A``, moved a little; ``B`` from nothing."""
    start = gaussian(4, 64, seed=1)
    return [(gaussian(96, 4, seed=10 + i), start + 0.02 * gaussian(4, 64, seed=20 + i), 2.0) for i in range(k)]


def independent(k: int, n: int = 96, r: int = 4) -> list[Part]:
    return [(gaussian(n, r, seed=10 + i), gaussian(r, 64, seed=20 + i), 2.0) for i in range(k)]


FULL_RANK = "have full rank"
MEAN = "lacks altogether still has eigenvalue"
START = "common initialisation"
CHANCE = "of the result is chance"
EMPTY = "Nothing is shared at τ"
NEVER = "Nothing is shared at any threshold"
CLOSE = "decided by rounding"
LOST = "lost more than the interference"
ALONE = "No module is present in two adapters"
ALL = [FULL_RANK, MEAN, START, CHANCE, EMPTY, NEVER, CLOSE, LOST, ALONE]


def test_a_good_result_has_no_warning() -> None:
    frame = pools.orthonormal(200, 18, 5)
    parts = []
    for i in range(2):
        columns = torch.cat(
            [
                frame[:, :2] + 0.01 * gaussian(200, 2, seed=i, dtype=torch.float64) / 14,
                frame[:, 2 + 8 * i : 10 + 8 * i],
            ],
            1,
        )
        parts.append((columns, gaussian(10, 64, seed=9 + i, dtype=torch.float64), 1.0))
    found = report(parts)
    assert found.shared_directions == 2
    assert found.warnings == []
    assert found.notices == []


@pytest.mark.parametrize(("text", "parts", "threshold", "settings"), [
    (FULL_RANK, [(gaussian(6, 8, seed=i), gaussian(8, 20, seed=9 + i), 1.0) for i in range(2)], 0.85, {}),
    (MEAN, pools.planted(3), 0.6, {"chain": "mean"}),
    (START, common_start(2), 0.85, {"side": "right"}),
    (CHANCE, pools.crowded(2), 0.85, {}),
    (EMPTY, independent(2), 0.85, {}),
    (NEVER, [(torch.zeros(30, 3), gaussian(3, 20, seed=i), 1.0) for i in range(2)], 0.85, {}),
    (CLOSE, [(torch.tensor([[1.0], [x]]), torch.ones(1, 3), 1.0) for x in (0.0, 1.0)], 0.5, {}),
    (LOST, pools.identical(2), 0.85, {}),
], ids=[FULL_RANK, MEAN, START, CHANCE, EMPTY, NEVER, CLOSE, LOST])  # fmt: skip
def test_warnings(text: str, parts: list[Part], threshold: float, settings: dict[str, object]) -> None:
    assert warned(report(parts, threshold, **settings), text)


@pytest.mark.parametrize(("text", "parts", "threshold", "settings"), [
    (FULL_RANK, [(gaussian(6, 8, seed=i), gaussian(8, 20, seed=9 + i), 1.0) for i in range(2)], 0.85, {"rank": 2}),
    (MEAN, pools.planted(3), 0.7, {"chain": "mean"}), (MEAN, pools.planted(3), 0.6, {}),
    (START, common_start(2), 0.85, {}), (START, independent(2), 0.85, {"side": "right"}),
    (CHANCE, pools.planted(2), 0.85, {}), (EMPTY, pools.planted(2), 0.85, {}), (CLOSE, pools.planted(2), 0.85, {}),
    (LOST, independent(2), 0.85, {}),
])  # fmt: skip
def test_no_warning(text: str, parts: list[Part], threshold: float, settings: dict[str, object]) -> None:
    assert not warned(report(parts, threshold, **settings), text)


def test_no_module_in_common() -> None:
    one, two = pools.cast(pools.planted(2), torch.float32)
    q, v = "model.layers.0.q_proj", "model.layers.0.v_proj"
    both, first, second = (
        pools.make_adapter(n, m) for n, m in (("a", {q: one, v: one}), ("b", {q: two}), ("c", {v: two}))
    )
    notice = f"1 modules are in one adapter only (first: {v}): they stay with its unique part."
    assert fl.decompose(fl.Pool([both, first])).report.notices == [notice]
    found = fl.decompose(fl.Pool([both, first, second]), mode="pairs")
    assert warned(next(r for r in found.reports if r.title == "b + c"), ALONE)
    assert found.pairs["b", "c"].unique_of("c").modules == [v]


def test_an_empty_result_says_what_would_be_shared() -> None:
    found = report(independent(3))
    (text,) = (w for w in found.warnings if EMPTY in w)
    assert f"{found.rows[0].eigenvalues[0]:.3f}" in text and "mode='pairs'" in text
    assert "opt in to τ = max(0.3, twice the chance edge) = 0.30" in text
    (text,) = (w for w in report(independent(2)).warnings if EMPTY in w)
    assert "opt in to τ = max(0.3, twice the chance edge) = 0.32" in text and "mode='pairs'" not in text


@pytest.mark.parametrize("threshold", [0.6, 0.75, 0.85, 0.95, 0.99])
@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
@pytest.mark.parametrize("k", [2, 3, 4, 6])
@pytest.mark.parametrize(("n", "r"), [(96, 4), (1000, 8), (40, 9), (30, 14)])
def test_no_advice_names_a_threshold_that_chance_reaches(n: int, r: int, k: int, chain: str, threshold: float) -> None:
    """Nor one that a direction reaches which an adapter lacks."""
    found = report(independent(k, n, r), threshold, chain=chain)
    least = max(found.rows[0].chance_edge, (k - 1) / k if chain == "mean" else 0.0)
    advice = r"(?:opt in to τ = |twice the chance edge\) = |Use a threshold above )(0\.\d+)"
    for value in (float(x) for w in found.warnings for x in re.findall(advice, w)):
        assert value >= least, found.warnings
    if not found.shared_directions:
        (text,) = (w for w in found.warnings if EMPTY in w)
        reached = found.rows[0].eigenvalues[0] > found.rows[0].chance_edge
        assert ("A threshold between chance and the largest" in text) == reached


def test_numbers_of_a_row() -> None:
    parts = pools.cast(pools.ragged(3), torch.float32)
    deltas = [pools.dense(p) for p in parts]
    dense = devec(deltas, 0.7, chain="palindrome", rank=5)
    found = report(parts, 0.7, chain="palindrome", rank=5)
    (row,) = found.rows
    assert (row.module, row.shape, row.adapters) == (MODULE, (40, 28), ("a0", "a1", "a2"))
    assert list(row.directions) == dense.kept and list(row.ranks) == [p[0].shape[1] for p in parts]
    assert row.shared == found.shared_directions == dense.basis.shape[1] > 0
    assert list(row.eigenvalues) == pytest.approx(dense.values.real[: len(row.eigenvalues)].tolist(), abs=WEAK64)
    assert row.gap == pytest.approx(float((dense.values.real[: dense.kept[0]] - 0.7).abs().min()), abs=WEAK64)
    for i, name in enumerate(row.adapters):
        whole, s = float(deltas[i].norm()), dense.sigma[i]
        assert row.energy_shared[name] == pytest.approx(float(dense.shared[i].norm()) ** 2 / whole**2, abs=WEAK64)
        assert row.norm_kept[name] == pytest.approx(float(dense.unique[i].norm()) / whole, abs=WEAK64)
        assert row.energy_in_cut[name] == pytest.approx(
            float(s[: dense.kept[i]].square().sum() / s.square().sum()), abs=WEAK64
        )


def test_notices() -> None:
    parts = pools.cast(pools.with_zero(3), torch.float32)
    parts[2] = pools.cast(pools.deficient_left(3), torch.float32)[2]
    pool = [pools.make_adapter(f"a{i}", {"x": p} if i == 0 else {"x": p, "y": p}) for i, p in enumerate(parts)]
    pool[0] = Adapter("a0", pool[0].updates, extras={"head.weight": Extra("value", torch.ones(2))})
    notices = " ".join(fl.decompose(fl.Pool(pool)).report.notices)
    for text in (
        "1 modules are missing in some adapters (first: y)",
        "2 modules hold a zero update (first: x)",
        "factors have directions below the noise floor or cut by rank or energy",
        "a0: 1 parameters that are no low-rank updates (first: head.weight) stay with its unique part",
    ):
        assert text in notices


@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
def test_report_file(mode: str, tmp_path: Path) -> None:
    pool = pools.make_pool(pools.cast(pools.planted(3), torch.float32))
    found = fl.decompose(pool, 0.7, mode=mode, target="a1" if mode == "iterative" else None)
    found.save(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["mode"] == mode and len(data["reports"]) == {"pool": 1, "pairs": 3, "iterative": 2}[mode]
    assert data["reports"][0]["rows"][0]["shared"] == data["reports"][0]["totals"]["shared_directions"]
    assert sorted(p.parent.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("*.safetensors")) == sorted(
        found.adapters()
    )
    titles = {"pool": ["a0 + a1 + a2"], "pairs": ["a0 + a1", "a0 + a2", "a1 + a2"],
              "iterative": ["a1 without a0 (step 1)", "a1 without a2 (step 2)"]}  # fmt: skip
    assert [r.title for r in found.reports] == titles[mode]


@pytest.mark.parametrize("keep", [False, True])
def test_reports_that_are_kept_are_made_once(keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = result.build_report
    monkeypatch.setattr(result, "build_report", lambda *args: made.append(args[1]) or build(*args))
    adapters = [pools.make_adapter(name, {MODULE: part}) for name, part in zip("abc", pools.planted(3), strict=True)]
    parts = fl.decompose(fl.Pool(adapters), 0.3, mode="pairs")
    parts.write(tmp_path, keep_reports=keep)
    written = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert [json.loads(json.dumps(r.as_dict())) for r in parts.reports] == written
    assert len(made) == (3 if keep else 6)


def test_norms_of_what_shares_nothing_come_when_they_are_asked_for() -> None:
    """From blocks that are held until then, or at once where they are too large or memory is bounded: the same bits,
    also when several threads ask."""
    names, n, m, r = ("a", "b", "c"), 40, 30, 4
    tensors = {x: {"q": (gaussian(n, r, seed=i), gaussian(r, m, seed=9 + i), 0.5 - i)} for i, x in enumerate(names)}
    pool = fl.Pool([fl.Adapter.from_tensors(t, name=x) for x, t in tensors.items()])
    later, at_once = fl.decompose(pool), fl.decompose(pool, memory="1GiB")
    (one,), (other,) = (d.components.results.values() for d in (later, at_once))
    assert not one.count and isinstance(one.batch.norms, LaterNorms) and isinstance(other.batch.norms, list)
    tensors["a"]["q"][0].zero_()  # what was found does not follow
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: one.norms, range(8)))
    assert set(found) == {other.norms} and one.batch.norms._blocks is None
    assert other.norms[2] == pytest.approx(float(pool["c"].delta("q").double().norm()), rel=1e-6)
    wide = {x: (gaussian(900, 256, seed=i), gaussian(256, 400, seed=9 + i)) for i, x in enumerate(names)}
    large = fl.Pool([fl.Adapter.from_tensors({"q": factors}, name=x) for x, factors in wide.items()])
    (one,) = fl.decompose(large).components.results.values()
    assert isinstance(one.batch.norms, list)
