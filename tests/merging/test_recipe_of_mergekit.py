"""Recipes that mergekit and we follow: its merged models beside our merged adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import owners
import pools
import pytest
import torch
import yaml
from builders import gaussian
from safetensors.torch import load_file
from tolerances import FLOAT32, SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.merging.recipe import parse_recipe
from fastlora.merging.recipe_settings import depths, value_at

TARGETS = ("q_proj", "down_proj")
RECIPES = {
    "linear": """
merge_method: linear
models:
  - model: BASE+a
    parameters: {weight: [{filter: q_proj, value: [0.2, 1.0, 5]}, {value: 3}]}
  - model: BASE+b
    parameters: {weight: [{filter: nothing, value: 7}]}
parameters: {weight: 0.5}
dtype: float32
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: BASE
models: [{model: BASE+a, parameters: {weight: [0.0, 1.0]}}, {model: BASE+b, parameters: {weight: -0.5}}]
parameters: {lambda: 0.7, int8_mask: true}
dtype: float32
""",
    "lambda by layer": """
merge_method: task_arithmetic
base_model: BASE
models: [{model: BASE+a}, {model: BASE+b}]
parameters: {weight: 1, lambda: [0.5, 1.5]}
dtype: float32
""",
    "ties": """
merge_method: ties
base_model: BASE
models:
  - model: BASE+a
    parameters: {weight: [0.3, 1.0]}
  - model: BASE+b
    parameters: {weight: [{filter: mlp, value: 0.4}, {value: 0.8}]}
parameters: {density: 0.4, normalize: true, lambda: 1.1}
dtype: float32
""",
    "ties, not divided": """
merge_method: ties
base_model: BASE
models: [{model: BASE+a}, {model: BASE+b}]
parameters: {weight: 0.6, density: 0.25, normalize: false}
dtype: float32
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: BASE
models: [{model: BASE+a, parameters: {weight: [1, 2]}}, {model: BASE+b, parameters: {weight: 0.5}}]
parameters: {density: 0.6, gamma: 0.05}
dtype: float32
""",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in ``BASE``, and two adapters of it."""
    transformers = owners.module("transformers")
    owners.module("mergekit.merge")
    root = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "BASE")
    shapes = {n: m.weight.shape for n, m in model.named_modules() if n.endswith(TARGETS)}
    for seed, name in enumerate("ab"):
        tensors = {
            n: (gaussian(s[0], 3, seed=20 * i + seed), gaussian(3, s[1], seed=999 + 20 * i + seed))
            for i, (n, s) in enumerate(shapes.items())
        }
        adapter = fl.Adapter.from_tensors(tensors, name=name)
        adapter.save(root / name)
    return root


def merged_by_mergekit(text: str, models: Path, place: Path) -> dict[str, Tensor]:
    """The weights of the merged model."""
    merge, config = owners.module("mergekit.merge"), owners.module("mergekit.config")
    options = merge.MergeOptions(
        copy_tokenizer=False, lora_merge_cache=str(place / "loras"), quiet=True, write_model_card=False
    )
    given = config.MergeConfiguration.model_validate(yaml.safe_load(text))
    merge.run_merge(given, str(place / "merged"), options=options)
    return _weights(place / "merged")


def placed(text: str, models: Path) -> str:
    return text.replace("BASE+", f"{models}/BASE+{models}/").replace("model: BASE\n", f"model: {models}/BASE\n")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_merged_model_has_the_merged_adapter(recipe: str, models: Path, tmp_path: Path) -> None:
    text = placed(RECIPES[recipe], models)
    before, after = _weights(models / "BASE"), merged_by_mergekit(text, models, tmp_path)
    found = parse_recipe(yaml.safe_load(text), "this test")
    whole = {"rank": 16} if found.method not in ("linear", "task_arithmetic") else {}
    merged = found.merge(**whole)
    assert len(merged.modules) == 6 and not any("PEFT" in note for note in merged.notes)
    for module in merged.modules:
        expected = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        error = float((pools.exact(merged.updates[module]) - expected).norm())
        # mergekit adds to weights in float32 and subtracts them again.
        assert error <= SUMS32 * float(expected.norm()), module


def test_a_sum_of_models_scales_the_base_too(models: Path, tmp_path: Path) -> None:
    """``linear`` without a division: an adapter cannot do that, and a note says so."""
    text = placed("""
merge_method: linear
models: [{model: BASE+a, parameters: {weight: 0.5}}, {model: BASE+b, parameters: {weight: {value: [1, 0]}}}]
parameters: {normalize: false}
dtype: float32
""", models)  # fmt: skip
    before, after = _weights(models / "BASE"), merged_by_mergekit(text, models, tmp_path)
    merged = parse_recipe(yaml.safe_load(text), "this test").merge()
    assert any("scale the base model" in note for note in merged.notes)
    for module, depth in depths(merged.modules).items():
        W = before[f"{module}.weight"].double()
        expected = after[f"{module}.weight"].double() - (0.5 + 1 - depth) * W
        error = float((pools.exact(merged.updates[module]) - expected).norm())
        assert error <= SUMS32 * float(expected.norm()), module


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


SETTINGS: list[Any] = [
    0.5, -2, "1e-3", [0, 1], [1.0, "2e0", -3.0, 4], [7],
    {"value": 3}, {"filter": "q_proj", "value": [0.0, 1.0, 5.0]}, [{"filter": "mlp", "value": 1}, {"value": [2, 3]}],
    [{"filter": "*", "value": 4}], [{"filter": "nothing", "value": 4}], [{"filter": "layers.1.", "value": [0, 8]}],
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_parameters_mean_the_same(setting: Any) -> None:
    config = owners.module("mergekit.config")

    def parsed(x: Any) -> Any:
        if isinstance(x, dict):
            return config.ConditionalParameter(**x)
        return [parsed(y) for y in x] if isinstance(x, list) else x

    modules = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]
    for module, depth in depths(modules).items():
        assert depth == int(module.split(".")[2]) / 2
        expected = config.evaluate_setting(f"{module}.weight", parsed(setting), depth, validate=float)
        found = value_at(setting, module, depth)
        assert found == expected if expected is None else found == pytest.approx(expected, rel=FLOAT32), module
