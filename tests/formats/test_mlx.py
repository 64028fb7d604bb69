"""Folders of MLX: ``ΔW = scale (A B)ᵀ``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastlora as fl
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
