"""What is composed and saved, loaded by peft: the model's outputs are those of the base weights plus the formula."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32
from torch import Tensor, nn

import fastlora as fl

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS = torch.arange(20).reshape(2, 10)
Parts = dict[str, tuple[Tensor, Tensor, float]]
Settings = dict[str, Any]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config).eval().requires_grad_(False)


PLAIN: Settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "output.dense"]}
OTHERS: dict[str, Settings] = {
    "one": PLAIN,
    "two": PLAIN,
    "ragged": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["query", "key"]},
}


def trained(settings: Settings, seed: int, directory: Path, dtype: torch.dtype = torch.float32) -> Parts:
    """A random adapter, saved by peft; its factors and scalings as peft has them, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            bert().to(dtype), peft.LoraConfig(**copy.deepcopy(settings)), autocast_adapter_dtype=False
        )
    torch.manual_seed(seed)
    parts: Parts = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                a.copy_(0.4 * torch.randn(a.shape))
                b.copy_(0.4 * torch.randn(b.shape))
            parts[name] = b.detach().double(), a.detach().double(), module.scaling["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return parts


def exact(weights: list[float], all_parts: list[Parts]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for weight, parts in zip(weights, all_parts, strict=True):
        for module, (b, a, s) in parts.items():
            found[module] = found.get(module, torch.zeros(())) + weight * s * (b @ a)
    return found


def paper(beta: list[float], alpha: list[float], all_parts: list[Parts]) -> dict[str, Tensor]:
    found = {}
    for module, (_, _, s) in all_parts[0].items():
        left = sum(w * parts[module][0] for w, parts in zip(beta, all_parts, strict=True))
        right = sum(w * parts[module][1] for w, parts in zip(alpha, all_parts, strict=True))
        found[module] = s * (left @ right)  # type: ignore[operator]
    return found


Formula = Callable[[Parts, Parts, Parts], dict[str, Tensor]]
EXPRESSIONS: dict[str, Formula] = {
    "one + two": lambda x, y, z: exact([1, 1], [x, y]),
    "0.6*one - 0.4*ragged": lambda x, y, z: exact([0.6, -0.4], [x, z]),
    "negate(one, 0.5) + 0*two": lambda x, y, z: exact([-0.5], [x]),
    "negate(two, semantics=pem)": lambda x, y, z: exact([-1], [y]),
    "analogy(one, two, ragged, 0.7, 0.5)": lambda x, y, z: exact([0.7, 0.5, -0.5], [x, y, z]),
    "add(one, two, 0.3, 0.7, semantics=pem)": lambda x, y, z: paper([0.3, 0.7], [0.3, 0.7], [x, y]),
    "add(one, two, 2, -1, semantics=pem)": lambda x, y, z: paper([2, -1], [2, -1], [x, y]),
    "analogy(one, two, one, 0.6, 0.4, semantics=pem)":
        lambda x, y, z: paper([0.6, 0.4, -0.4], [0.6, 0.4, 0.4], [x, y, x]),
    "(one - ragged)/2 + add(one, two, semantics=pem)": lambda x, y, z: {
        m: exact([0.5, -0.5], [x, z])[m] + paper([0.5, 0.5], [0.5, 0.5], [x, y]).get(m, 0.0)
        for m in exact([0.5, -0.5], [x, z])
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_outputs(expression: str, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = [trained(s, seed, tmp_path / name, dtype) for seed, (name, s) in enumerate(OTHERS.items(), 1)]
    result = fl.compose(expression, {n: tmp_path / n for n in OTHERS if n in expression})
    result.save(tmp_path / "out", dtype="float32")
    deltas = EXPRESSIONS[expression](*parts)
    plain = bert().double()
    for module, delta in deltas.items():
        plain.get_submodule(module).weight += delta  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "out")).eval()
    with torch.no_grad():
        got = loaded(TOKENS).last_hidden_state.double()
        expected = plain(TOKENS).last_hidden_state
        before = bert()(TOKENS).last_hidden_state
    assert float((expected - before).norm()) > 0.05 * float(before.norm())
    # The roundings of the adapter's factors, and of the sums of the model that it is added to.
    assert float((got - expected).norm()) <= 2 * FLOAT32 * float(expected.norm())
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            error = float((module.get_delta_weight("default").double() - deltas[name]).norm())
            assert error <= FLOAT32 * float(deltas[name].norm()), name
