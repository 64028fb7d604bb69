"""Adapters of parameters in a live model: the experts of a mixture, read in place, written through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import fingerprint, layers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastlora as fl
from fastlora.integrations import peft as live
from tests.tolerances import SUMS32

WEIGHTS = {"a": 0.7, "b": -0.4}


class Bank(nn.Module):
    """Three experts of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("eoi,ni->neo", self.gate_up_proj, x))
        return torch.einsum("eoi,nei->no", self.down_proj, hidden)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.proj = nn.Linear(6, 6)
        self.experts = Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.proj(x))


def model_with(*names: str) -> Any:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"target_modules": ["proj"], "target_parameters": parameters, "lora_alpha": 6}
    model = get_peft_model(Mixture(), LoraConfig(r=2, **config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, **config))
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def dense(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    """``Σ w ΔW`` as peft adds it to the parameters."""
    found = {}
    layer = layers(model)["experts"]
    while hasattr(layer, "parameter_name"):
        delta = sum(w * layer.get_delta_weight(n).detach().double() for n, w in weights.items())
        found[f"experts.{layer.parameter_name}"] = delta
        layer = layer.base_layer
    proj = layers(model)["proj"]
    found["proj.weight"] = sum(w * proj.get_delta_weight(n).detach().double() for n, w in weights.items())
    return found


def test_experts_are_read_in_place_and_merged_through_files(tmp_path: Path) -> None:
    model = model_with("a", "b")
    pool = live.pool(model)
    wanted = dense(model, WEIGHTS)
    total = fl.merge(pool, WEIGHTS, method="cat")
    for path in ("experts.gate_up_proj", "experts.down_proj"):
        found = torch.stack([total.delta(f"{path}[{e}]") for e in range(3)]).double()
        torch.testing.assert_close(found, wanted[path], rtol=SUMS32, atol=SUMS32)
    assert set(pool.modules) == set(fl.Pool.load(_saved(model, tmp_path / "inputs")).modules)
    total.save(tmp_path / "mix")
    net = Mixture().double()
    with torch.no_grad():
        for path, delta in wanted.items():
            net.get_parameter(path).add_(delta)
        x = torch.randn(4, 6)
        again = PeftModel.from_pretrained(Mixture(), tmp_path / "mix").eval()
        torch.testing.assert_close(again(x).double(), net(x.double()), rtol=SUMS32, atol=SUMS32)


def _saved(model: Any, folder: Path) -> list[Path]:
    model.save_pretrained(folder)
    return [folder / "a", folder / "b"]


def test_they_are_not_written_in_place() -> None:
    model = model_with("a", "b")
    before = fingerprint(model)
    pool = live.pool(model)
    for call in (
        lambda: live.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "mix", "cat"),
        lambda: live.write(model, pool["a"], "mix"),
        lambda: live.decompose_adapters(model),
        lambda: live.swap(model, pool["a"], "b"),
    ):
        with pytest.raises(fl.UnsupportedAdapter, match="target_parameters"):
            call()
    assert repr(fingerprint(model)) == repr(before)


def test_a_module_inside_another_adapted_one_is_not_lost() -> None:
    """peft puts the wrapper of a parameter around its module, and so around an adapted module in that."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 4))
            self.gate = nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Inner()

    model = get_peft_model(Outer(), LoraConfig(r=2, target_modules=["gate"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=[], target_parameters=["mlp.weight"]))
    with pytest.raises(fl.UnsupportedAdapter, match="lies in another adapted module"):
        live.pool(model, ["a"])
