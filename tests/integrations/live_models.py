"""Small models that peft adapted, and what they must compute: dense sums in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

KINDS = ["emb", "up", "down", "conv1", "conv2", "conv3"]


class Net(nn.Module):
    """One of each kind of module that LoRA adapts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.emb = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 18)
        self.down = nn.Linear(18, 12, bias=False)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.conv3 = nn.Conv3d(5, 3, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.up(self.emb(ids))))  # [4, 12]
        planes = self.conv1(hidden[None]).reshape(1, 6, 3, 4)
        pictures = self.conv2(torch.tanh(planes))
        return self.conv3(torch.tanh(pictures)[:, :, None]).flatten()


IDS = torch.tensor([3, 0, 19, 7])


def lora(r: int = 4, alpha: float = 6, targets: Any = None, **fields: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets or KINDS, **fields)


def ia3(targets: list[str], feedforward: list[str]) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


def adapted(configs: Mapping[str, Any], dtype: torch.dtype = torch.float32, net: nn.Module | None = None) -> PeftModel:
    """A ``PeftModel`` with an adapter for each configuration, whose numbers are random and of the weights' size."""
    base = (Net() if net is None else net).to(dtype).eval()
    first, *others = configs
    model = get_peft_model(base, copy.deepcopy(configs[first]), adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, copy.deepcopy(configs[name]), autocast_adapter_dtype=False)
    torch.manual_seed(11)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.3)
        elif ".ia3_l." in key:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """``B`` and ``A`` as peft has them, or ``None`` where the layer lacks the adapter."""
    if name in layer.lora_A:
        return layer.lora_B[name].weight, layer.lora_A[name].weight
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_B[name], layer.lora_embedding_A[name]
    return None


def layers(model: nn.Module) -> dict[str, Any]:
    """``{path in the base model: layer}``."""
    kept = {p: m for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {path.removeprefix("base_model.model."): layer for path, layer in kept.items()}


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """``ΔW [n, m]`` of every module in float64, with the scaling that applies."""
    made = {}
    for path, layer in layers(model).items():
        pair = factors(layer, name) if isinstance(layer, LoraLayer) else None
        if pair is not None:
            B, A = (x.detach().double().flatten(1) for x in pair)
            made[path] = float(layer.scaling[name]) * (B @ A)
    return made


def weighted(model: nn.Module, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """``Σ w ΔW`` of every module in float64."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def truncated(dense: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    best = {}
    for path, delta in dense.items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best[path] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


def dense_outputs(dense: Mapping[str, Tensor], shifts: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the base model gives in float64 with updates in its weights."""
    net = Net().double().eval()
    with torch.no_grad():
        for path, delta in dense.items():
            module = net.get_submodule(path)
            update = delta.mT if isinstance(module, nn.Embedding) else delta.reshape(module.weight.shape)
            module.weight += update
        for path, shift in (shifts or {}).items():
            net.get_submodule(path).bias += shift.double()
        return net(IDS)


def outputs(model: nn.Module, name: str) -> Tensor:
    """What a model gives with one adapter; what was active is active again afterwards."""
    before = {path: list(layer.active_adapters) for path, layer in layers(model).items()}
    for layer in layers(model).values():
        layer.set_adapter(name, inference_mode=True)
    with torch.no_grad():
        given = model(IDS)
    for path, layer in layers(model).items():
        layer.set_adapter(before[path], inference_mode=True)
    return given.double()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a failure must leave as it was."""
    state: dict[str, Any] = {}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[key] = (tensor.requires_grad, str(tensor.dtype), tensor.detach().double().flatten().tolist(), id(tensor))
    for path, module in model.named_modules():
        state[f"{path}()"] = (type(module), module.training, id(module))
        if isinstance(module, BaseTunerLayer):
            held = [*module.adapter_layer_names, *module.other_param_names, "lora_variant"]
            names = {key: sorted(getattr(module, key)) for key in held if hasattr(getattr(module, key, None), "keys")}
            state[f"{path}{{}}"] = (names, list(module.active_adapters), module.disable_adapters)
    tuner = getattr(model, "base_model", model)
    configs = getattr(tuner, "peft_config", None)
    state["configs"] = None if configs is None else {name: config.to_dict() for name, config in configs.items()}
    state["lists"] = [list(getattr(tuner, key, [])) for key in ("targeted_module_names", "targeted_parameter_names")]
    state["active"] = [getattr(m, "active_adapter", None) for m in (model, tuner) if hasattr(m, "peft_config")]
    return state


def largest_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of all modules, relative to the size of each."""
    assert found.keys() == wanted.keys()
    return max(float((found[p] - wanted[p]).norm() / wanted[p].norm()) for p in wanted)
