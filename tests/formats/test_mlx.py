"""Folders of MLX: ``ΔW = scale (A B)ᵀ``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora as fl
from fastlora.core.data import Extra
from tests.tolerances import FLOAT32

Q, E = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f"{Q}.lora_a": torch.randn(6, 2),
        f"{Q}.lora_b": torch.randn(2, 8),
        f"{E}.lora_a": torch.randn(12, 2),
        f"{E}.lora_b": torch.randn(2, 6),
    }


def write(folder: Path, state: dict[str, Tensor], **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(state, folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize(
    ("parameters", "scale"),
    [({"rank": 2, "scale": 20.0}, 20.0), ({"rank": 2, "scale": 10.0, "alpha": 16}, 80.0), ({"scale": -1}, -1.0)],
)
def test_what_a_folder_means(parameters: dict[str, object], scale: float, tmp_path: Path) -> None:
    state = tensors()
    adapter = fl.load(write(tmp_path / "mine", state, lora_parameters=parameters, model="org/base"))
    assert adapter.name == "mine" and adapter.base.model == "org/base" and adapter.modules == [E, Q]
    for module in (Q, E):
        meant = scale * (state[f"{module}.lora_a"].double() @ state[f"{module}.lora_b"].double()).mT
        torch.testing.assert_close(
            adapter.delta(module).double(), meant, rtol=0, atol=FLOAT32 * float(meant.abs().max())
        )
    assert adapter.updates[E].layout.kind == "embedding" and adapter.updates[Q].layout.kind == "linear"
    assert adapter.base.form is not None and adapter.base.form.format == "mlx"


def test_magnitudes(tmp_path: Path) -> None:
    state = {k: t for k, t in tensors().items() if k.startswith(Q)} | {f"{Q}.m": torch.ones(8)}
    adapter = fl.load(write(tmp_path / "mine", state, fine_tune_type="dora"))
    assert isinstance(adapter, fl.DoRA) and adapter.magnitudes[Q].axis == "out"


@pytest.mark.parametrize(
    ("state", "fields", "words"),
    [
        ({f"{Q}.lora_a": torch.ones(6, 2)}, {}, "needs lora_a and lora_b"),
        ({f"{Q}.lora_a": torch.ones(6, 2), f"{Q}.lora_b": torch.ones(3, 8)}, {}, r"needed are \[in, rank\]"),
        ({f"{Q}.lora_a": torch.ones(4, 2, 6), f"{Q}.lora_b": torch.ones(4, 8, 2)}, {}, "experts of a layer"),
        ({f"{Q}.weight": torch.ones(6, 2)}, {}, "none of lora_a, lora_b, m"),
        (tensors(), {"fine_tune_type": "full"}, "holds whole weights"),
        (tensors(), {"lora_parameters": {"rank": 2}}, "lora_parameters.scale is null, needed is a number"),
        (tensors(), {"lora_parameters": {"rank": 2, "scale": 1, "alpha": "x"}}, "alpha is"),
        (tensors() | {f"{Q}.m": torch.ones(5)}, {}, "needed are 8 numbers"),
    ],
)  # fmt: skip
def test_what_has_no_meaning(state: dict[str, Tensor], fields: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(fl.InputError, match=words):
        fl.load(write(tmp_path / "mine", state, **fields))


def same_files(one: Path, other: Path) -> bool:
    states = [load_file(folder / "adapters.safetensors") for folder in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][k]) for k, t in states[0].items())


def config_of(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_result_is_a_folder_like_its_first_input(tmp_path: Path) -> None:
    given = write(tmp_path / "mine", tensors(), num_layers=16, model="org/base")
    adapter = fl.load(given)
    assert same_files(given, adapter.save(tmp_path / "again"))
    assert config_of(tmp_path / "again") == {
        "fine_tune_type": "lora", "num_layers": 16, "model": "org/base",
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": [E, "self_attn.q_proj"]},
    }  # fmt: skip
    total = 0.5 * adapter + 0.25 * fl.load(write(tmp_path / "other", {k: 2 * t for k, t in tensors().items()}))
    again = fl.load(total.save(tmp_path / "sum"))
    assert again.base.form is not None and again.base.form.format == "mlx"
    for module in (Q, E):
        assert float((again.delta(module) - total.delta(module)).norm()) <= FLOAT32 * float(total.delta(module).norm())


def test_a_peft_adapter_becomes_one(tmp_path: Path) -> None:
    """All modules have one rank in MLX, and one scale."""
    made = fl.Adapter.from_tensors(
        {Q: (torch.randn(8, 3), torch.randn(3, 6), 2.0), f"{Q[:-6]}k_proj": (torch.randn(8, 1), torch.randn(1, 6), 0.5)}
    )
    folder = fl.convert(made, tmp_path / "mlx", "mlx")
    state, parameters = load_file(folder / "adapters.safetensors"), config_of(folder)["lora_parameters"]
    assert isinstance(parameters, dict) and parameters["scale"] == 1.0
    assert {tuple(t.shape) for k, t in state.items() if k.endswith("lora_a")} == {(6, parameters["rank"])}
    again = fl.load(fl.convert(folder, tmp_path / "peft", "peft"))
    for module in made.modules:
        meant = (state[f"{module}.lora_a"].double() @ state[f"{module}.lora_b"].double()).mT
        for found in (again, fl.load(folder)):
            assert float((found.delta(module) - made.delta(module)).norm()) <= FLOAT32 * float(meant.norm())
        assert float((meant - made.delta(module)).norm()) <= FLOAT32 * float(meant.norm())
    with pytest.raises(fl.OutputError, match="exists"):
        fl.convert(made, folder, "mlx")
    fl.convert(made, folder, "mlx", overwrite=True)


def test_what_has_no_place_in_a_folder_is_refused(tmp_path: Path) -> None:
    conv = fl.Adapter.from_tensors({"conv": (torch.randn(8, 2, 1, 1), torch.randn(2, 4, 3, 3), 1.0)})
    with pytest.raises(fl.InputError, match=r"no place for convolutions or experts \(conv\); write a PEFT directory"):
        fl.convert(conv, tmp_path / "mlx", "mlx")
    plain = fl.Adapter.from_tensors({Q: (torch.randn(8, 3), torch.randn(3, 6), 2.0)})
    biased = replace(plain, extras={f"{Q}.bias": Extra("delta", torch.ones(8))})
    with pytest.raises(fl.InputError, match=r"no place for what lies beside the factors.*--drop-extras"):
        fl.convert(biased, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    state = {k: t.to(getattr(torch, dtype)) for k, t in tensors().items()}
    given = write(tmp_path / "mine", state)
    assert same_files(given, fl.load(given).save(tmp_path / "again"))
