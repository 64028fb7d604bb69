"""Sweeps: every point once, one read of the factors, and nothing lost when a point fails."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from pools import MODULE
from test_poolgram import counted, ragged_pool, same_bits

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.coefficients import sweep


@pytest.fixture
def pool() -> fl.Pool:
    return ragged_pool()


def norm(adapter: Adapter) -> float:
    return float(pools.exact(adapter.updates[MODULE]).norm())


def test_a_hundred_merges_read_the_factors_once(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"x": [i / 10 for i in range(10)], "y": [-i / 7 for i in range(10)]}
    built: list[Adapter] = []

    def build(point: Mapping[str, Any]) -> Adapter:
        built.append(fl.merge(pool, {"a0": point["x"], "a1": point["y"], "a2": 1.0}, rank=2))
        return built[-1]

    with counted(monkeypatch) as reads:
        found = fl.sweep(build, grid, adapters=pool, score=lambda a: float(a.details["retained_energy"][MODULE]))
    assert len(found.rows) == 100 and set(reads.values()) == {1}
    for i in (0, 57, 99):
        x, y = found.rows[i].point["x"], found.rows[i].point["y"]
        assert (x, y) == (grid["x"][i // 10], grid["y"][i % 10])
        same_bits(built[i], fl.merge(pool, {"a0": x, "a1": y, "a2": 1.0}, rank=2))


def test_thresholds_and_pairs_of_a_decomposition(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = fl.PoolGram(pool)
    grid = [{"tau": t, "chain": c} for t in (0.2, 0.6, 0.9) for c in ("product", "palindrome", "mean")]
    with counted(monkeypatch) as reads:
        found = fl.sweep(
            lambda p: fl.decompose(pool, p["tau"], chain=p["chain"]).shared, grid, adapters=gram,
            score=lambda a: {"rank": a.updates[MODULE].rank, "modules": len(a.modules)},
        )  # fmt: skip
    assert not reads
    expected = [fl.decompose(pool, p["tau"], chain=p["chain"]).shared.updates[MODULE].rank for p in grid]
    assert [r.scores["rank"] for r in found.rows] == expected and found.scores == ["rank", "modules"]


def test_strengths_of_a_modulation(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = fl.PoolGram(pool)
    a0, a1, a2 = pool.adapters
    with counted(monkeypatch) as reads:
        found = fl.sweep(
            lambda p: fl.modulate(a0, fl.dipm.shift(a1, a2, p["s"]), granularity="component"), {"s": [0.0, 0.5, 1.0]},
            adapters=gram, score=norm,
        )  # fmt: skip
    assert not reads and found.rows[0].scores["score"] == norm(a0)


def test_best_table_and_nan(pool: fl.Pool) -> None:
    found = fl.sweep(
        lambda p: pool["a0"] * p["w"], {"w": [1.0, 3.0, 2.0]}, score={"norm": norm, "odd": lambda a: math.nan}
    )
    assert found.best().point == {"w": 3.0} and found.best("norm", maximize=False).point == {"w": 1.0}
    assert [r.scores["norm"] for r in found.rows] == pytest.approx([norm(pool["a0"]) * w for w in (1, 3, 2)])
    table = found.table()
    cells = [list(c.cells) for c in table.columns]
    assert table.row_count == 3 and cells[0] == ["1", "3", "2"] and cells[1][1].endswith(" *") and cells[2][0] == "nan"
    with pytest.raises(fl.InputError, match="no row with a 'odd' that is a number"):
        found.best("odd")
    with pytest.raises(fl.InputError, match="no score 'x'; it has norm, odd"):
        found.best("x")


def test_rows_are_kept_and_taken_up_again(pool: fl.Pool, tmp_path: Path) -> None:
    file, calls = tmp_path / "sweep.json", []

    def build(point: Mapping[str, Any]) -> Adapter:
        calls.append(point["w"])
        if point["w"] == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return pool["a0"] * point["w"]

    def run(**more: Any) -> sweep.Sweep:
        return fl.sweep(build, {"w": [1, 2, 3, 4]}, score=norm, **more)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(save=file, key="weights of a0: norms")
    partial = stopped.value.sweep  # type: ignore[attr-defined]
    assert (
        [r.point["w"] for r in partial.rows]
        == [1, 2]
        == [r["point"]["w"] for r in json.loads(file.read_text())["rows"]]
    )
    assert "2 of 4 points" in stopped.value.__notes__[0]
    whole = run(save=file, key="weights of a0: norms")
    assert calls == [1, 2, 3, 3, 4] and [r.point["w"] for r in whole.rows] == [1, 2, 3, 4]
    loaded = sweep.Sweep.load(file)
    assert [r.scores for r in loaded.rows] == [r.scores for r in whole.rows]
    calls[:] = [3]
    assert [r.point["w"] for r in run(resume=partial, key="weights of a0: norms").rows] == [1, 2, 3, 4]
    assert calls == [3, 3, 4]
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(fl.InputError, match=r"the rows of .*sweep.json are of .*, not of .*; choose another file"):
        fl.sweep(lambda p: pool["a0"], {"w": [1]}, score=norm, save=file)


def never(adapter: Adapter) -> float:
    raise AssertionError("a point that is there was computed again")


def test_rows_of_what_may_be_another_sweep_are_refused(pool: fl.Pool, tmp_path: Path) -> None:
    file, grid = tmp_path / "sweep.json", {"w": [1.0, 2.0]}

    def run(score: Any = norm, expression: Any = "w*a0 - a1", grid: Any = grid, **more: Any) -> sweep.Sweep:
        return fl.sweep(expression, grid, adapters=pool, score=score, save=file, **more)

    first = run(key="norms")
    before = file.read_bytes()
    assert [r.scores for r in run(never, key="norms").rows] == [r.scores for r in first.rows]

    for arguments, message in [
        ({}, "have the key 'norms', not None"),
        ({"key": "accuracies"}, "have the key 'norms', not 'accuracies'"),
        ({"key": "norms", "expression": "w*a0 + a1"}, r"are of 'w\*a0 - a1', not of 'w\*a0 \+ a1'"),
        ({"key": "norms", "grid": {"w": [1.0], "v": [1.0]}, "expression": lambda p: p}, "are of 'w.a0 - a1', not of"),
        ({"key": ""}, "must be a text"),
    ]:
        with pytest.raises(fl.InputError, match=message):
            run(never, **arguments)
    assert file.read_bytes() == before
    grid["w"].append(3.0)
    with pytest.raises(fl.InputError, match="earlier rows have the scores score, but this call computes other"):
        run(lambda a: {"other": 1.0}, key="norms")
    assert [r.point["w"] for r in run(key="norms").rows] == [1.0, 2.0, 3.0]


def test_a_file_without_a_key_needs_the_users_word(pool: fl.Pool, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"

    def run(score: Any, points: list[float], **more: Any) -> sweep.Sweep:
        return fl.sweep(lambda p: p["w"] * pool["a0"], {"w": points}, score=score, save=file, **more)

    first = run(norm, [1.0, 2.0])
    for more in ({}, {"key": "norms"}):
        with pytest.raises(fl.InputError, match=r"holds 2 rows of a sweep of .* cannot be known"):
            run(never, [1.0, 2.0], **more)
    again = run(never, [2.0, 1.0], resume=True)
    assert [r.scores for r in again.rows] == [r.scores for r in reversed(first.rows)]
    more = run(norm, [1.0, 2.0, 3.0], resume=sweep.Sweep(first.of, first.rows[:1]))
    assert [r.scores["score"] for r in more.rows] == pytest.approx([norm(pool["a0"]) * w for w in (1, 2, 3)])
    for earlier, message in [
        (sweep.Sweep("x", first.rows), "the rows of resume= are of 'x', not of"),
        (sweep.Sweep(first.of, [sweep.Row({"v": 1.0}, {"score": 1.0}, 0.0)]), "have the variables v, not w"),
    ]:
        with pytest.raises(fl.InputError, match=message):
            run(never, [1.0], resume=earlier)


def test_scalings_and_task_vectors_are_composed() -> None:
    zero, one = ({"w": torch.full((2, 2), v)} for v in (0.0, 1.0))
    named: Any = {"t": fl.task_vector(zero, one)}
    found = fl.sweep("c*t", {"c": [1.0, 3.0]}, adapters=named, score=lambda x: x.norm)
    assert [row.scores["score"] for row in found.rows] == [2.0, 6.0]


def test_scores_that_are_no_number_in_json(pool: fl.Pool, tmp_path: Path) -> None:
    found = fl.sweep(lambda p: pool["a0"], {"w": [1]}, score=lambda a: math.inf, save=tmp_path / "s.json")
    assert found.rows[0].scores == {"score": math.inf}
    assert math.isnan(sweep.Sweep.load(tmp_path / "s.json").rows[0].scores["score"])


def test_plots(pool: fl.Pool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for i, grid in enumerate(
        [{"x": [2.0, 1.0, 3.0]}, {"x": [1.0, 2.0], "y": [0.0, 1.0]}, {"x": [1.0, 2.0], "n": ["b", "c"]}]
    ):
        found = fl.sweep(lambda p: pool["a0"] * p["x"], grid, score=lambda a: {"norm": norm(a), "one": 1.0})
        picture = found.plot(tmp_path / f"{i}.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(fl.OutputError, match="exists"):
        found.plot(tmp_path / "0.png")


def test_expressions(pool: fl.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"movie": pool["a0"], "spam": pool["a2"]}
    weights, built = (0.25, -1e-7, 2), list[Adapter]()

    def score(adapter: Adapter) -> float:
        built.append(adapter)
        return norm(adapter)

    found = fl.sweep("lam*movie - (1 - lam)*spam", {"lam": weights}, adapters=named, score=score)
    expected = [norm(w * pool["a0"] - (1 - w) * pool["a2"]) for w in weights]
    assert [r.scores["score"] for r in found.rows] == pytest.approx(expected)
    assert found.of == "lam*movie - (1 - lam)*spam"
    assert [a.provenance["numbers"] for a in built] == [{"lam": w} for w in weights]
    with counted(monkeypatch) as reads:
        fl.sweep("lam*movie+spam", {"lam": [1, 2]}, adapters=named, score=lambda a: norm(fl.compress(a, 1)))
    assert set(reads.values()) == {1}


def test_a_variable_may_be_an_option_and_a_quoted_name(pool: fl.Pool) -> None:
    named = {"lam.a": pool["a0"], "b": pool["a2"]}
    found = fl.sweep("lam*compress(lam.a, 'r 1')", {"lam": [2], "r 1": [1, 2]}, adapters=named, score=norm)
    assert [r.scores["score"] for r in found.rows] == pytest.approx(
        [norm(2 * fl.compress(pool["a0"], r)) for r in (1, 2)]
    )
    found = fl.sweep(
        "shared(lam.a, b, threshold=t)", {"t": [0.2, 0.9]}, adapters=named, score=lambda a: a.updates[MODULE].rank
    )
    both = fl.Pool([pool["a0"], pool["a2"]])
    assert [r.scores["score"] for r in found.rows] == [
        fl.decompose(both, t).shared.updates[MODULE].rank for t in (0.2, 0.9)
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(grid={}), "grid has no points"), (dict(grid={"x": []}), "grid has no points"),
    (dict(grid=[{"x": 1}, {"y": 1}]), "one has y and the first x"),
    (dict(expression="x*a0"), "needs adapters"),
    (dict(expression="a0", adapters=1), "'x' does not occur in 'a0'"),
    (dict(expression="x*", adapters=1), "ends too early"),
    (dict(expression="x*a0*a1", grid={"x": [1], "a1": [1]}, adapters=1), "'a1' is an adapter and a variable"),
    (dict(expression="x*a0", grid={"x": [math.nan]}, adapters=1), "the number 'x' is nan: it must be a finite number"),
    (dict(score=lambda a: "good"), "score must be a number"),
    (dict(expression=lambda p: 1), "is a int, not an adapter"),
])  # fmt: skip
def test_messages(arguments: dict[str, Any], message: str, pool: fl.Pool) -> None:
    given = {"expression": lambda p: pool["a0"], "grid": {"x": [1]}, "score": norm} | arguments
    if "adapters" in given:
        given["adapters"] = pool
    with pytest.raises(fl.InputError, match=message):
        fl.sweep(**given)  # type: ignore[arg-type]


def test_a_file_that_is_no_sweep(pool: fl.Pool, tmp_path: Path) -> None:
    for text in (
        "",
        "[1]",
        '{"format": "other"}',
        '{"format": "fastlora sweep 2", "of": "x", "key": null, "rows": [{}]}',
    ):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(fl.InputError, match="is no saved sweep"):
            fl.sweep(lambda p: pool["a0"], {"w": [1]}, score=norm, save=tmp_path / "s.json")


def test_tensors_of_numbers_are_values(pool: fl.Pool) -> None:
    found = fl.sweep(lambda p: pool["a0"] * p["w"], {"w": torch.linspace(0, 1, 3)}, score=norm)
    assert [r.point["w"] for r in found.rows] == [0.0, 0.5, 1.0]
