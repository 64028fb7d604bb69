"""Recipes against sums of dense updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixed
import pools
import pytest
import tolerances
import torch
import yaml
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.errors import InputError
from fastlora.merging.recipe import parse_recipe, recipe_text

MODULES = [f"model.layers.{layer}.{part}" for layer in range(4) for part in ("attn.q", "mlp.up")] + ["lm_head"]


def make_pool(count: int = 2) -> Pool:
    return Pool([
        pools.make_adapter(f"m{i}", {
            m: (gaussian(5, i + 1, seed=100 * i + j), gaussian(i + 1, 7, seed=50 + 100 * i + j), 0.5 + i)
            for j, m in enumerate(MODULES)
        })
        for i in range(count)
    ])  # fmt: skip


def recipe(text: str) -> Any:
    return parse_recipe(yaml.safe_load(text), "test")


def expected(pool: Pool, module: str, weights: list[float]) -> Tensor:
    return torch.einsum("k,knm->nm", torch.tensor(weights, dtype=torch.float64), mixed.dense(pool, module))


def test_filters_and_gradients() -> None:
    pool = make_pool()
    merged = recipe("""
merge_method: task_arithmetic
models:
  - model: base+a
    parameters: {weight: [{filter: attn.q.weight, value: [0.0, 3.0, -3.0]}, {filter: layers, value: 2}]}
  - model: base+b
parameters: {weight: [1, 4], lambda: 0.5, int8_mask: true}
base_model: base
dtype: float32
""").merge(pool)
    for module in MODULES:
        layer = int(module.split(".")[2]) if "layers" in module else 0
        first = [0.0, 2.0, 1.0, -3.0][layer] if "attn" in module else 2.0 if "layers" in module else 1.0
        assert (
            mixed.distance(merged, module, expected(pool, module, [0.5 * first, 0.5 * (1 + layer)]))
            <= tolerances.ROUNDOFF64
        )
    assert merged.provenance["recipe"]["merge_method"] == "task_arithmetic"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 3}}, {model: b}]", [0.75, 0.25]),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {normalize: false, weight: 0.3}",
            [0.3, 0.3],
        ),
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {lambda: 3}", [1.5, 1.5]),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [3, 3]}}, {model: b}]", [0.75, 0.25]),
        ("merge_method: task_arithmetic\nmodels: [{model: a}, {model: b}]\nparameters: {lambda: 0.7}", [0.7, 0.7]),
        ("merge_method: cat\nmodels: [{model: a, parameters: {weight: -2}}, {model: b}]", [-2.0, 1.0]),
        ("merge_method: cat\nmodels: [{model: a, parameters: {weight: 1e-3}}, {model: b}]", [1e-3, 1.0]),
        ("merge_method: cat\nmodels: [{model: a}, {model: b}]\nparameters: {lambda: 0.5}", [0.5, 0.5]),
        ("merge_method: mean\nmodels: [{model: a, parameters: {weight: [3, 3]}}, {model: b}]", [0.75, 0.25]),
        # A filter that does not fit leaves it to the parameters of all.
        (
            """
merge_method: cat
models: [{model: a, parameters: {weight: {filter: x, value: 2}}}, {model: b}]
parameters: {weight: 0.4}
""",
            [0.4, 0.4],
        ),
    ],
)
def test_sums(text: str, weights: list[float]) -> None:
    pool = make_pool()
    merged = recipe(text).merge(pool)
    for module in MODULES:
        assert mixed.distance(merged, module, expected(pool, module, weights)) <= tolerances.ROUNDOFF64


def test_our_methods_with_weights_by_module() -> None:
    pool = make_pool(3)
    text = """
merge_method: svd
models:
  - {model: a, parameters: {weight: [{filter: mlp, value: 0.5}], rank: 2}}
  - {model: b, parameters: {rank: 2}}
  - {model: c, parameters: {rank: 2}}
"""
    merged = recipe(text).merge(pool)
    for module in MODULES:
        total = expected(pool, module, [0.5 if "mlp" in module else 1.0, 1.0, 1.0])
        assert mixed.distance(merged, module, mixed.truncated(total, 2)) <= tolerances.GRAM64


def test_a_weight_of_a_module_holds_for_its_bias() -> None:
    adapters = [
        fl.Adapter.from_tensors({"layers.0.a": (gaussian(4, 1, seed=i), gaussian(1, 3, seed=9 + i))}, name=f"m{i}")
        for i in range(2)
    ]
    from dataclasses import replace

    from fastlora.core.data import Extra

    biased = replace(adapters[0], extras={"layers.0.a.bias": Extra("delta", torch.ones(4))})
    text = "merge_method: task_arithmetic\nmodels: [{model: a, parameters: {weight: [2, 2]}}, {model: b}]"
    merged = recipe(text).merge(Pool([biased, adapters[1]]))
    assert torch.equal(merged.extras["layers.0.a.bias"].tensor.double(), torch.full((4,), 2.0, dtype=torch.float64))
    free = replace(adapters[0], extras={"norm.weight": Extra("delta", torch.ones(4))})
    with pytest.raises(InputError, match=r"has norm\.weight beside its updates"):
        recipe(text).merge(Pool([free, adapters[1]]))


@pytest.mark.parametrize(("name", "method", "given", "parameters"), [
    ("ties", "ties", "density: 0.4, normalize: true", {"density": 0.4, "convention": "mergekit"}),
    ("ties", "ties", "density: 0.4, normalize: false", {"density": 0.4, "convention": "mergekit", "combine": "sum"}),
    ("ties", "ties", "density: 0.4", {"density": 0.4}),
    ("dare_linear", "dare", "density: 0.4, int8_mask: true", {"density": 0.4, "convention": "mergekit"}),
    ("dare_ties", "dare", "density: 0.4, seed: 3",
     {"density": 0.4, "convention": "mergekit", "elect": "total", "seed": 3}),
    ("breadcrumbs", "breadcrumbs", "density: 0.4, rescale: false", {"density": 0.4}),
    ("breadcrumbs_ties", "breadcrumbs", "density: 0.4, gamma: 0.1", {"density": 0.4, "gamma": 0.1, "elect": "total"}),
    ("della", "della", "density: 0.4, normalize: false", {"density": 0.4, "combine": "sum"}),
    ("della_linear", "della", "density: 0.4", {"density": 0.4, "elect": "none", "combine": "sum"}),
    ("della_linear", "della", "density: 0.4, normalize: true", {"density": 0.4, "elect": "none"}),
])  # fmt: skip
def test_methods_of_mergekit(name: str, method: str, given: str, parameters: dict[str, Any]) -> None:
    pool = make_pool()
    models = "models: [{model: a, parameters: {weight: 0.7}}, {model: b}]"
    found = recipe(f"merge_method: {name}\n{models}\nparameters: {{{given}, lambda: 0.5}}").merge(pool, rank=5)
    expected = fl.merge(pool, dict(zip(pool.names, (0.7, 1.0), strict=True)), method=method, rank=5, **parameters)
    for module in MODULES:
        assert mixed.distance(found, module, 0.5 * pools.exact(expected.updates[module])) <= tolerances.ROUNDOFF64
    assert any("convention of PEFT" in note for note in found.notes) == (given == "density: 0.4" and name == "ties")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    pool = make_pool()
    weights = [0.1, -1.0 / 3.0]
    text = recipe_text(["x/one", "x/two"], weights, "svd", {"rank": 2, "energy": None}, "bfloat16")
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    again = fl.Recipe.load(file)
    assert again.dtype == "bfloat16" and again.named == {"one": "x/one", "two": "x/two"}
    merged = again.merge(pool)
    same = fl.merge(pool, dict(zip(pool.names, weights, strict=True)), method="svd", rank=2)
    assert all(torch.equal(merged.delta(m), same.delta(m)) for m in MODULES)
    assert recipe("merge_method: svd\nmodels: [{model: x/a}, {model: y/A}]").named == {"a": "x/a", "A-2": "y/A"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: []\nmerge_method: linear\nmodels: [{model: a}]", '"slices" cannot be followed'),
        ("[1]", "has no merge_method"),
        ("merge_method: linear", "models must be a list"),
        ("merge_method: linear\nmodels: [{path: a}]", "entry 1 of models"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "entry 1 of models"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: 3", "parameters must be"),
        ("merge_method: linear\nmodels: [{model: x+a}, {model: y+b}]", "of different models"),
        ("merge_method: linear\nbase_model: x\nmodels: [{model: x}, {model: a}]", 'is the base model "x", which is no'),
        ("merge_method: linear\nbase_model: x\nmodels: [{model: y+a}]", "of different models"),
        ("merge_method: linear\nmodules: {}\nmodels: [{model: a}]", '"modules" cannot be followed'),
        ("merge_method: [a]\nmodels: [{model: a}]", "must be a name"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: 3", "dtype 3"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("merge_method: frankenmerge", "does not exist"),
        ("parameters: {density: 0.5}\nmerge_method: linear", "does not take density"),
        ("parameters: {normalize: 3}\nmerge_method: linear", "must be true or false"),
        ("parameters: {weight: [a]}\nmerge_method: linear", "is no number"),
        ("parameters: {weight: [{filter: q}]}\nmerge_method: linear", "must be {filter"),
        ("parameters: {weight: [1, -1], normalize: [true]}\nmerge_method: linear", "normalize must be one value"),
        ("parameters: {weight: [{filter: q, value: 1}]}\nmerge_method: equal_energy", "no meaning for 'equal_energy'"),
        (
            "parameters: {weight: [1, 2], scope: model, rank: 5}\nmerge_method: ties",
            "no meaning for 'ties' of the whole",
        ),
        ("parameters: {weight: [1, 2], convention: paper, rank: 5}\nmerge_method: ties", "no meaning for 'ties'"),
        ("parameters: {lambda: [1, 2], density: 0.5, rank: 5}\nmerge_method: magnitude", "lambda must be one number"),
        ("parameters: {normalize: true, density: 0.5}\nmerge_method: dare_ties", "normalize of dare_ties cannot be"),
        ("parameters: {rescale: true}\nmerge_method: ties", "rescale of ties cannot be other than false here"),
        ("parameters: {weight: [0, 1]}\nmerge_method: mean", "add up to 0"),
        ("parameters: {weight: .nan}\nmerge_method: linear", "no number|finite"),
        ("parameters: {rank: 2}\nmerge_method: cat", "does not take rank"),
    ],
)
def test_parameters_without_a_meaning_are_refused(fields: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(f"{fields}\nmodels: [{{model: a}}, {{model: b}}]").merge(make_pool())


def test_parameters_of_models_must_agree_and_stand_once() -> None:
    pool = make_pool()
    text = "merge_method: svd\nmodels: [{model: a, parameters: {rank: 1}}, {model: b}]"
    with pytest.raises(InputError, match="rank differs between the adapters"):
        recipe(text).merge(pool)
    with pytest.raises(InputError, match="rank is given in the recipe and beside it"):
        recipe("merge_method: svd\nmodels: [{model: a}, {model: b}]\nparameters: {rank: 2}").merge(pool, rank=1)
    with pytest.raises(InputError, match="the recipe has 1 adapters, and the pool 2"):
        recipe("merge_method: svd\nmodels: [{model: a}]").merge(pool)
    with pytest.raises(InputError, match=r"layers\.0\.attn\.q add up to 0"):
        recipe("merge_method: linear\nmodels: [{model: a, parameters: {weight: [-1, -1]}}, {model: b}]").merge(pool)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        fl.Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="no readable YAML"):
        fl.Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("merge_method: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="no readable YAML"):
        fl.Recipe.load(tmp_path / "code.yaml")
    with pytest.raises(InputError, match="cannot name a\\+b"):
        recipe_text(["a+b"], [1.0], "svd", {}, None)


def test_tokenizers_are_told() -> None:
    found = recipe("merge_method: cat\nmodels: [{model: a}, {model: b}]\ntokenizer_source: union")
    assert found.merge(make_pool()).notes == ("tokenizer_source of the recipe says nothing about adapters",)
