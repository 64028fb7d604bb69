"""``fastlora extract`` as a user runs it: from two models to a task vector or an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian
from command import done, refused
from safetensors.torch import save_file
from tolerances import SUMS32

import fastlora as fl


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """``base.safetensors`` and ``tuned.safetensors``, whose weight differs by a matrix of rank 2."""
    base = {
        "layer.weight": gaussian(12, 9, seed=1),
        "layer.bias": gaussian(1, 12, seed=2)[0],
        "norm.weight": torch.ones(9),
    }
    change = gaussian(12, 2, seed=3) @ gaussian(2, 9, seed=4)
    tuned = {
        "layer.weight": base["layer.weight"] + change,
        "layer.bias": base["layer.bias"] + 1,
        "norm.weight": torch.ones(9),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path


def test_a_task_vector_that_compose_takes(models: Path) -> None:
    found = done("extract", "base.safetensors", "tuned.safetensors", "-o", "tau.safetensors", cwd=models)
    assert found.out == "tau.safetensors: task vector of 2 parameters\n" and found.err == ""
    done("compose", "-0.5*t", "t=tau.safetensors", "-o", "half.safetensors", "-q", cwd=models)
    expected = fl.task_vector(models / "base.safetensors", models / "tuned.safetensors")
    half = fl.load(models / "half.safetensors")
    assert isinstance(half, fl.TaskVector) and set(half) == set(expected) == {"layer.weight", "layer.bias"}
    for parameter in half:
        torch.testing.assert_close(half.deltas[parameter], -0.5 * expected.deltas[parameter])


@pytest.mark.parametrize("cut", [("--rank", "2"), ("--energy", "0.999999")])
def test_an_adapter_of_the_weights(cut: tuple[str, str], models: Path) -> None:
    found = done("extract", "base.safetensors", "tuned.safetensors", *cut, "--out", "lora", "--json", cwd=models)
    data = found.json()
    assert data["modules"] == 1 and data["rank"] == 2 and any("layer.bias" in n for n in data["notices"])
    expected = fl.task_vector(models / "base.safetensors", models / "tuned.safetensors").deltas["layer.weight"]
    adapter = fl.load(models / "lora")
    assert isinstance(adapter, fl.Adapter)
    assert float((adapter.delta("layer") - expected).norm()) <= SUMS32 * float(expected.norm())
    done("extract", "base.safetensors", "tuned.safetensors", *cut, "--biases", "-o", "both", "-q", cwd=models)
    both = fl.load(models / "both")
    assert isinstance(both, fl.Adapter) and list(both.extras) == ["layer.bias"]


def test_refusals(models: Path) -> None:
    pair = ("base.safetensors", "tuned.safetensors")
    assert "a task vector is a file, NAME.safetensors; give --rank" in refused("extract", *pair, "-o", "x", cwd=models)
    message = refused("extract", *pair, "-o", "x.safetensors", "--rank", "2", cwd=models)
    assert "an adapter is a directory; leave out --rank" in message
    assert "--biases is for an adapter" in refused("extract", *pair, "--biases", "-o", "x.safetensors", cwd=models)
    assert "give rank=N or energy=X" in refused("extract", *pair, "--rank", "1", "--energy", "1", "-o", "x", cwd=models)
    assert "is an input" in refused("extract", *pair, "-o", "base.safetensors", "--overwrite", cwd=models)
    assert "no file or directory" in refused("extract", "none", pair[1], "-o", "x.safetensors", cwd=models)
    save_file({"layer.weight": torch.ones(3, 3)}, models / "other.safetensors")
    message = refused("extract", pair[0], "other.safetensors", "-o", "x.safetensors", cwd=models)
    assert "only one of the two models has" in message
    message = refused("extract", pair[0], "other.safetensors", "--common-only", "-o", "x.safetensors", cwd=models)
    assert "these are different models" in message
