"""``fl.choose``: every candidate once, selection and report on different data, and errors that can be checked."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import MODULE
from test_poolgram import counted, ragged_pool
from tolerances import SUMS32

import fastlora as fl
from fastlora.adapters.lora import Adapter

RULES = ["pico", {"method": "iso_c", "rank": 2}]


@pytest.fixture
def pool() -> fl.Pool:
    return ragged_pool()


def total(pool: fl.Pool, factor: float = 1.0) -> torch.Tensor:
    return factor * sum((a.delta(MODULE).double() for a in pool.adapters if MODULE in a), torch.zeros(()))


class Nearest:
    """Scores the distance from a target, example by example; counts its calls."""

    def __init__(self, target: torch.Tensor, examples: int = 12) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target, self.calls = target, 0
        self.rows = torch.randn(examples, target.shape[1], generator=generator, dtype=torch.float64)

    def __call__(self, adapter: Adapter) -> list[float]:
        self.calls += 1
        off = self.rows @ (adapter.delta(MODULE).double() - self.target).mT
        return (-off.square().mean(1)).tolist()


def test_the_scale_is_found_and_factors_are_read_once(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Nearest(total(pool, 0.4))
    with counted(monkeypatch) as reads:
        found = fl.choose(pool, score, scales=[0.2, 0.4, 0.8], methods=RULES)
    stored = {id(f) for f in reads}
    assert set(reads.values()) == {1} and len(stored) == len(reads)
    assert found.best.point == {"merge": "sum", "scale": 0.4} and found.beats_sum and found.apart
    assert [r.point["scale"] for r in found.sweep.rows] == [1.0, 0.2, 0.4, 0.8, "own", "own", "best sum", "best sum"]
    assert score.calls == 8 and not found.left
    torch.testing.assert_close(found.adapter.delta(MODULE).double(), total(pool, 0.4), rtol=0, atol=SUMS32)


def test_scales_of_nobody_are_the_sum_the_matched_norm_the_mean_and_between(pool: fl.Pool) -> None:
    found = fl.choose(pool, Nearest(total(pool)), methods=[])
    scales = [r.point["scale"] for r in found.sweep.rows]
    inner = fl.PoolGram(pool).inner()
    matched = float(inner.diagonal().sqrt().mean() / inner.sum().sqrt())
    assert scales[:3] == [1.0, pytest.approx(matched, rel=1e-3), pytest.approx(1 / 3, rel=1e-3)]
    assert len(scales) == len(set(scales)) == 11
    assert min(scales) == pytest.approx(1 / 6, rel=1e-3) and max(scales) == 1.0
    assert found.best is found.plain and found.beats_sum is False
    assert "It is the plain sum itself." in found.conclusion


def test_rules_come_at_their_own_length_and_at_that_of_the_best_sum(pool: fl.Pool) -> None:
    built: list[Adapter] = []
    target = total(pool, 0.5)

    def score(adapter: Adapter) -> dict[str, float]:
        built.append(adapter)
        return {"select": -float((adapter.delta(MODULE).double() - target).norm()), "report": 7.0}

    found = fl.choose(pool, score, scales=[0.5], methods=["iso_c", "pico"], rank=2)
    norms = [math.sqrt(sum(float(a.delta(m).double().square().sum()) for m in a.modules)) for a in built]
    names = [(r.point["merge"], r.point["scale"]) for r in found.sweep.rows]
    assert names[2:] == [("iso_c", "own"), ("pico", "own"), ("iso_c", "best sum"), ("pico", "best sum")]
    whole = [sum((a.delta(m).double() for a in pool.adapters if m in a), torch.zeros(())) for m in pool.modules]
    length = 0.5 * math.sqrt(sum(float(w.square().sum()) for w in whole))
    assert norms[4] == pytest.approx(length, rel=1e-5) and norms[5] == pytest.approx(length, rel=1e-5)
    own = fl.merge(pool, method="iso_c", rank=2)
    torch.testing.assert_close(built[2].delta(MODULE), own.delta(MODULE))
    scaled = built[4].delta(MODULE) * own.delta(MODULE).norm() / built[4].delta(MODULE).norm()
    torch.testing.assert_close(scaled, own.delta(MODULE), rtol=1e-4, atol=SUMS32)
    assert {u.rank for u in built[0].updates.values()} <= {1, 2}, "the sums are cut too"
    assert found.gain(found.best, found.plain) == (0.0, None) and found.beats_sum is None
    assert "Whether that is chance cannot be known" in " ".join(found.conclusion)


def test_errors_are_those_of_the_half_that_did_not_select(pool: fl.Pool) -> None:
    score = Nearest(total(pool, 0.3), examples=9)
    found = fl.choose(pool, score, scales=[0.3, 0.6], methods=[])
    select, report = (found.best.examples[n] for n in ("select", "report"))
    assert len(select) == 4 and len(report) == 5
    values = [Nearest(total(pool, 0.3), examples=9)(0.3 * fl.merge(pool, method="cat"))[i] for i in range(9)]
    assert sorted(select + report) == pytest.approx(sorted(values), abs=1e-6)
    mean, error = found.reported(found.best)
    assert mean == pytest.approx(statistics.fmean(report)) and error == statistics.stdev(report) / 5**0.5
    differences = [a - b for a, b in zip(report, found.plain.examples["report"], strict=True)]
    gain, of_gain = found.gain(found.best, found.plain)
    assert gain == pytest.approx(statistics.fmean(differences))
    assert of_gain == pytest.approx(statistics.stdev(differences) / 5**0.5)
    assert found.beats_sum is (gain > 2 * of_gain)


def test_one_number_is_said_to_be_selection_and_report(pool: fl.Pool) -> None:
    found = fl.choose(pool, lambda a: float(a.delta(MODULE).norm()), scales=[2.0], methods=[])
    assert not found.apart and found.best.point["scale"] == 2.0 and found.beats_sum is None
    assert any("same data" in line for line in found.conclusion)
    columns, rows = found.rows()
    assert columns == ["merge", "scale", "score", "− plain sum"] and rows[1][0] == "sum *"


def test_a_budget_is_kept_and_what_it_leaves_out_is_named(pool: fl.Pool) -> None:
    score = Nearest(total(pool))
    found = fl.choose(pool, score, budget=4)
    assert score.calls == 4 and [r.point["merge"] for r in found.sweep.rows] == ["sum"] * 4
    assert len(found.left) == 11 + 8 - 4 and "The budget left out 15" in found.conclusion[-1]
    scales = [r.point["scale"] for r in found.sweep.rows]
    assert scales[3] == pytest.approx(1 / 6, rel=1e-3)


def test_an_interrupted_comparison_is_taken_up_again(pool: fl.Pool, tmp_path: Path) -> None:
    score, file = Nearest(total(pool, 0.4)), tmp_path / "scores.json"

    def failing(adapter: Adapter) -> list[float]:
        if score.calls == 5:
            raise KeyboardInterrupt
        return score(adapter)

    settings: dict[str, Any] = {"scales": [0.2, 0.4], "methods": RULES, "save": file, "key": "distance"}
    with pytest.raises(KeyboardInterrupt):
        fl.choose(pool, failing, **settings)
    again = fl.choose(pool, score, **settings)
    assert score.calls == 7
    fresh = fl.choose(pool, score, scales=[0.2, 0.4], methods=RULES)
    assert [(r.point, r.examples) for r in again.sweep.rows] == [(r.point, r.examples) for r in fresh.sweep.rows]
    assert score.calls == 14 and again.conclusion == fresh.conclusion
    with pytest.raises(fl.InputError, match="have the key 'distance', not 'other'"):
        fl.choose(pool, score, scales=[0.2, 0.4], methods=RULES, save=file, key="other")


def test_the_winner_is_what_its_recipe_makes(pool: fl.Pool) -> None:
    target = 0.37 * fl.merge(pool, method="iso_c", rank=2).delta(MODULE).double()
    found = fl.choose(pool, Nearest(target), scales=[0.1], methods=["iso_c"], rank=2)
    assert found.best.point["merge"] == "iso_c"
    told = found.adapter.provenance
    factor = told["parameters"]["lambda"] if found.best.point["scale"] == "best sum" else 1.0  # type: ignore[index]
    own = fl.merge(pool, method="iso_c", rank=2)
    torch.testing.assert_close(found.adapter.delta(MODULE), factor * own.delta(MODULE), rtol=1e-5, atol=SUMS32)
    assert told["merge"] == "iso_c"


def test_a_table_and_a_picture(pool: fl.Pool, tmp_path: Path) -> None:
    found = fl.choose(pool, Nearest(total(pool, 0.4)), scales=[0.4], methods=["pico"])
    table = found.table()
    assert table.row_count == 4 and [str(c.header) for c in table.columns][-1] == "− plain sum"
    data = found.as_dict()
    assert data["winner"]["merge"] == "sum" and data["gain_over_plain_sum"]["more_than_two_errors"] is True
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert found.plot(tmp_path / "merges.png").stat().st_size > 1000


@pytest.mark.parametrize(("score", "said"), [
    (lambda a: math.nan, "must be finite"), (lambda a: [], "must be finite"), (lambda a: "x", "must be a number"),
    (lambda a: [1.0, 2.0, 3.0], "3 examples"), (lambda a: {"select": 1.0}, "has 'select' and 'report'"),
    (lambda a: {"select": 1.0, "report": []}, "must be finite"), (lambda a: [1.0, math.inf, 0, 0], "must be finite"),
], ids=["nan", "none", "text", "three", "half", "empty", "inf"])  # fmt: skip
def test_scores_that_are_none_are_refused(pool: fl.Pool, score: Any, said: str) -> None:
    with pytest.raises(fl.InputError, match=said):
        fl.choose(pool, score, scales=[], methods=[])


@pytest.mark.parametrize(("settings", "said"), [
    ({"budget": 0}, "budget=0"), ({"methods": ["nothing"]}, "'nothing' does not exist"),
    ({"methods": ["regmean"]}, "'regmean' needs data"), ({"methods": "pico"}, "must be a list"),
    ({"scales": [math.inf]}, "finite numbers"), ({"methods": ["ties"]}, "matrices of full rank"),
    ({"methods": [{"method": "pico", "x": 1}]}, "does not take x"), ({"weights": {"b": 1.0}}, "does not have"),
], ids=["budget", "method", "data", "text", "scales", "rank", "parameter", "weights"])  # fmt: skip
def test_wrong_settings_are_refused_before_any_score(pool: fl.Pool, settings: dict[str, Any], said: str) -> None:
    score = Nearest(total(pool))
    with pytest.raises(fl.InputError, match=said):
        fl.choose(pool, score, **settings)
    assert score.calls == 0
    with pytest.raises(fl.InputError, match="a pool of one adapter"):
        fl.choose(fl.Pool([pool.adapters[0]]), score)


def test_adapters_of_weight_zero_and_sums_that_cancel(pool: fl.Pool) -> None:
    a0 = pool.adapters[0]
    opposite = fl.compose("-1*x", {"x": a0})
    assert isinstance(opposite, fl.Adapter)
    both = fl.Pool([a0, dataclasses.replace(opposite, name="b"), pool.adapters[2]])
    weights = {"a0": 2.0, "b": 2.0, "a2": 0.0}
    found = fl.choose(both, lambda a: 1.0, weights=weights, methods=[])
    assert len(found.sweep.rows) == 9, "there is no matched norm, and the mean is one of those between"
    assert float(found.adapter.delta(MODULE).norm()) <= SUMS32
    found = fl.choose(both, lambda a: float(a.delta(MODULE).norm()), weights={"a0": 2.0}, methods=[])
    torch.testing.assert_close(found.adapter.delta(MODULE), 2 * a0.delta(MODULE), rtol=1e-5, atol=SUMS32)
