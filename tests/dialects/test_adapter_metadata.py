"""The configuration in the header of a file: which module has which scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tolerances import FLOAT32

import fastlora as fl

KEY = "lora_adapter_metadata"


def saved(path: Path, keys: str, metadata: dict[str, Any]) -> fl.Adapter:
    """An adapter of one module with ``BA = 3`` everywhere, as it is read."""
    module = f"{keys}transformer_blocks.0.attn.to_q"
    tensors = {f"{module}.lora_A.weight": torch.ones(3, 8), f"{module}.lora_B.weight": torch.ones(8, 3)}
    save_file(tensors, path, {KEY: json.dumps(metadata)})
    adapter = fl.load(path)
    assert isinstance(adapter, fl.Adapter)
    return adapter


@pytest.mark.parametrize(
    ("keys", "metadata", "scaling"),
    [
        ("", {"r": 3, "lora_alpha": 6}, 2.0),
        ("", {"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn.to_q": 12}}, 4.0),
        ("", {"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ("transformer.", {"transformer.r": 3, "transformer.lora_alpha": 6}, 2.0),
        # What is said of the component is more than what is said of none.
        ("transformer.", {"transformer.r": 3, "transformer.lora_alpha": 6, "r": 8, "lora_alpha": 8}, 2.0),
        ("", {"text_encoder.r": 3, "text_encoder.lora_alpha": 6}, 1.0),
        ("", {}, 1.0),
    ],
)
def test_a_scale_that_metadata_say(tmp_path: Path, keys: str, metadata: dict[str, Any], scaling: float) -> None:
    adapter = saved(tmp_path / "a.safetensors", keys, metadata)
    (module,) = adapter.modules
    torch.testing.assert_close(adapter.delta(module), torch.full((8, 8), 3 * scaling), atol=FLOAT32, rtol=0)


def test_damaged_fields_without_a_component(tmp_path: Path) -> None:
    with pytest.raises(fl.InputError, match="lora_alpha = "):
        saved(tmp_path / "a.safetensors", "", {"r": 3, "lora_alpha": "six"})


def test_what_a_model_of_diffusers_saves_itself(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "to_k", "proj_mlp"], rank_pattern={"to_k": 2},
        alpha_pattern={"single_transformer_blocks.0.proj_mlp": 1}, init_lora_weights=False,
    )  # fmt: skip
    model.add_adapter(config)
    model.save_lora_adapter(tmp_path)
    adapter = fl.load(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert set(adapter.modules) == set(layers) and len(layers) == 5
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(adapter.delta(name), expected, atol=FLOAT32, rtol=0)
