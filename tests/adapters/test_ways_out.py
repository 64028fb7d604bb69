"""Where arithmetic is refused, the way out that the message names gives the right weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter
from safetensors.torch import load_file, save_file
from tolerances import SUMS32

import fastlora as fl
from fastlora.core.data import Extra, Magnitude, Scaling

MODULE, HEAD = "layers.0.q", "head.weight"
BASE = {f"{MODULE}.weight": gaussian(40, 30, seed=1), HEAD: gaussian(5, 40, seed=2)}


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, fl.Adapter | fl.DoRA | fl.IA3]:
    """An adapter of each kind that cannot be added to a LoRA as it is."""
    make_adapter(tmp_path / "lora", {MODULE: (40, 30)})
    lora = fl.load(tmp_path / "lora")
    assert isinstance(lora, fl.Adapter)
    magnitude = Magnitude(6 + gaussian(1, 40, seed=3)[0], "out")
    return {
        "lora": lora,
        "dora": fl.DoRA("dora", lora.updates, {MODULE: magnitude}),
        "ia3": fl.IA3("ia3", {MODULE: Scaling(1 + 0.2 * gaussian(1, 30, seed=4), feedforward=True)}),
        "saved": fl.Adapter("saved", lora.updates, extras={HEAD: Extra("value", gaussian(5, 40, seed=5))}),
    }


@pytest.mark.parametrize("kind", ["dora", "ia3", "saved"])
def test_into_the_model_and_out_of_it(
    kind: str, kinds: dict[str, fl.Adapter | fl.DoRA | fl.IA3], tmp_path: Path
) -> None:
    with pytest.raises(fl.InputError, match=r"fastlora apply"):
        fl.add([kinds[kind], kinds["lora"]], [0.5, 1.0])
    if kind == "ia3":
        with pytest.raises(fl.InputError, match=r"fastlora apply BASE A --out TUNED.*fastlora extract BASE TUNED"):
            fl.Pool([kinds[kind], kinds["lora"]])
    save_file(BASE, tmp_path / "base.safetensors")
    tuned = {}
    for name in (kind, "lora"):
        fl.apply(tmp_path / "base.safetensors", kinds[name], tmp_path / f"{name}.safetensors")
        tuned[name] = load_file(tmp_path / f"{name}.safetensors")
    one, two = (fl.task_vector(tmp_path / "base.safetensors", tmp_path / f"{n}.safetensors") for n in (kind, "lora"))
    both = 0.5 * one + two
    for name, weight in BASE.items():
        change = 0.5 * (tuned[kind][name] - weight) + (tuned["lora"][name] - weight)
        found = both.deltas.get(name, torch.zeros_like(weight))
        assert float((found - change).norm()) <= SUMS32 * float(weight.norm())
    if kind != "saved":
        adapter = fl.extract(tmp_path / "base.safetensors", tmp_path / f"{kind}.safetensors", energy=1.0)
        merged = fl.merge(fl.Pool([adapter, kinds["lora"]]), {adapter.name: 0.5, "lora": 1.0}, method="cat")
        change = both.deltas[f"{MODULE}.weight"]
        assert float((merged.delta(MODULE) - change).norm()) <= 1e-5 * float(change.norm())
