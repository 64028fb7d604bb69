"""``fastlora merge RECIPE.yaml`` and ``--save-recipe``."""

from __future__ import annotations

from pathlib import Path

import merge_calls
import pools
import pytest
import tolerances
import torch
import yaml
from builders import gaussian
from command import done, refused
from safetensors.torch import load_file

import fastlora as fl

OPTIONS = ("rank", "energy", "min_energy")
OTHERS = {
    "ties": {"density": 0.7, "convention": "mergekit"}, "core": {"rule": "della", "seed": 5}, "slerp": {"t": 0.3},
    "pico": {"gauge": "raw"}, "wudi": {"ridge": 1e-3}, "sum": {"strength": -1.0 / 3.0}, "karcher": {"iterations": 3},
    "regmean": {"off_diagonal": 0.9}, "dare": {"elect": "total", "seed": 7},
}  # fmt: skip
"""Parameters beside those that a method needs."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        parts = {
            f"layers.{i}.q": (gaussian(6, 2, seed=seed + i), gaussian(2, 5, seed=9 + seed + i), 1.0) for i in (0, 1)
        }
        pools.make_adapter(name, parts).save(tmp_path / name)
    return tmp_path


def test_a_saved_recipe_does_the_same_again(folder: Path) -> None:
    done(
        "merge",
        "a:0.3",
        "b:-0.7",
        "--method",
        "svd",
        "--rank",
        "2",
        "--save-recipe",
        "r.yaml",
        "--out",
        "x",
        cwd=folder,
    )
    done("merge", "r.yaml", "--out", "y", cwd=folder)
    one, two = fl.load(folder / "x"), fl.load(folder / "y")
    for module in one.modules:
        assert all(torch.equal(p, q) for p, q in zip(one.factors(module), two.factors(module), strict=True))
    assert "exists" in refused("merge", "a", "--save-recipe", "r.yaml", "--out", "z", cwd=folder)
    done("merge", "a", "--save-recipe", "r.yaml", "--out", "x", "--overwrite", cwd=folder)


@pytest.mark.parametrize("method", fl.methods())
def test_a_recipe_of_every_method_gives_the_same_bits(method: str, folder: Path) -> None:
    """Also with other values than the defaults; statistics are given again, which a recipe does not hold."""
    record = fl.methods()[method]
    options: list[str] = []
    for name, value in {**merge_calls.parameters_of(method), **OTHERS.get(method, {})}.items():
        option = name.replace("_", "-")
        options += [f"--{option}", str(value)] if name in OPTIONS else ["--set", f"{name}={value}"]
    data: list[str] = []
    if record.takes_data:
        pool = fl.Pool([fl.load(folder / name) for name in "ab"])
        statistics = merge_calls.data_of(method, pool)
        assert statistics is not None
        statistics.save(folder / "inputs.safetensors")
        data = ["--data", "inputs.safetensors"]
    weights = ["a:0.3", "b:1.7"]
    command = ["--method", method, *options, *data]
    done("merge", *weights, *command, "--save-recipe", "r.yaml", "--out", "x", cwd=folder)
    again = done("merge", "r.yaml", *data, "--out", "y", cwd=folder)
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in "xy")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert "convention of PEFT" not in again.err
    told = yaml.safe_load((folder / "r.yaml").read_text())
    assert told["merge_method"] == method and [m["parameters"]["weight"] for m in told["models"]] == [0.3, 1.7]


def test_a_recipe_writes_to_the_places_that_a_merge_does(folder: Path) -> None:
    """A file is no folder."""
    (folder / "r.yaml").write_text("merge_method: cat\nmodels: [{model: a}, {model: b}]\n")
    place = "--out", "x.safetensors"
    assert refused("merge", "r.yaml", *place, cwd=folder) == refused("merge", "a:1", "b:1", *place, cwd=folder)
    assert not (folder / "x.safetensors").exists()


def test_a_recipe_with_a_gradient(folder: Path) -> None:
    text = """
merge_method: task_arithmetic
models:
  - model: base+a
    parameters: {weight: [0, 2]}
  - model: b
"""
    (folder / "r.yaml").write_text(text)
    assert "of different models" not in done("merge", "r.yaml", "--dtype", "float32", "--out", "x", cwd=folder).err
    a, b, found = (fl.load(folder / n) for n in ("a", "b", "x"))
    for module, weight in (("layers.0.q", 0.0), ("layers.1.q", 2.0)):
        expected = weight * pools.exact(a.updates[module]) + pools.exact(b.updates[module])
        error = float((pools.exact(found.updates[module]) - expected).norm() / expected.norm())
        assert error <= tolerances.FLOAT32


def test_what_a_recipe_has_itself_is_refused_beside_it(folder: Path) -> None:
    (folder / "r.yaml").write_text("merge_method: cat\nmodels: [{model: a}, {model: b}]\n")
    assert "leave out --method" in refused("merge", "r.yaml", "--method", "cat", "--out", "x", cwd=folder)
    assert "leave out the other arguments" in refused("merge", "a", "r.yaml", "--out", "x", cwd=folder)
    assert "a recipe is a file *.yaml" in refused("merge", "a", "--save-recipe", "r.txt", "--out", "x", cwd=folder)
    assert "there is no recipe" in refused("merge", "none.yml", "--out", "x", cwd=folder)
    (folder / "r.yaml").write_text("merge_method: cat\nmodels: [{model: a}, {model: missing}]\n")
    assert "missing" in refused("merge", "r.yaml", "--out", "x", cwd=folder)
    assert not (folder / "x").exists()
