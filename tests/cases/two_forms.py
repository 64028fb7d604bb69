"""Small adapters of one mixture-of-experts model in its two forms, and what they say of the fused weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian, make_config, peft_tensors, write_peft
from tolerances import FLOAT32
from torch import Tensor, nn

import fastlora as fl
from fastlora.cli.app import app

EXPERTS, HIDDEN, INNER, RANK, ALPHA = 3, 16, 24, 2, 4
WHERE = "model.layers.0."


def run(*arguments: str | Path) -> None:
    """A command that must succeed."""
    app([str(a) for a in arguments], standalone_mode=False)


def factors(n: int, m: int, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return gaussian(n, rank, seed=2 * seed), gaussian(rank, m, seed=2 * seed + 1)


def stored(b: list[Tensor], a: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of all experts as PEFT stores them: the expert is the fastest index of B, the slowest of A."""
    return torch.stack(b, 2).flatten(1), torch.cat(a)


def fused_tensors(
    layer: Mapping[str, list[tuple[Tensor, Tensor]]], where: str = f"{WHERE}mlp.experts", older: bool = False
) -> dict[str, Tensor]:
    """Tensors of ``gate_up_proj`` and ``down_proj`` (wrapped outermost), ``older``: each update transposed."""
    tensors = {}
    for parameter, pairs in layer.items():
        wrapper = where + (".base_layer" if parameter == "gate_up_proj" and len(layer) > 1 else "")
        turned = [(a.mT, b.mT) for b, a in pairs] if older else pairs
        tensors |= peft_tensors({wrapper: stored([b for b, _ in turned], [a for _, a in turned])})
    return tensors


def fused_layer(seed: int = 5, inner: int = INNER, hidden: int = HIDDEN) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return {
        "gate_up_proj": [factors(2 * inner, hidden, 100 * seed + e) for e in range(EXPERTS)],
        "down_proj": [factors(hidden, inner, 100 * seed + 50 + e) for e in range(EXPERTS)],
    }


def fused_adapter(
    folder: Path,
    seed: int = 5,
    *,
    layer: Mapping[str, list[tuple[Tensor, Tensor]]] | None = None,
    where: str = f"{WHERE}mlp.experts",
    older: bool = False,
    attention: bool = True,
    **fields: Any,
) -> Path:
    layer = fused_layer(seed) if layer is None else layer
    tensors = fused_tensors(layer, where, older)
    if attention:
        tensors |= peft_tensors({f"{WHERE}self_attn.q_proj": factors(HIDDEN, HIDDEN, 100 * seed + 99)})
    parameters = [f"experts.{p}" for p in layer]
    modules = ["q_proj"] if attention else []
    config = make_config(
        r=RANK, lora_alpha=ALPHA, target_modules=modules, target_parameters=parameters, lora_dropout=0.0, **fields
    )
    return write_peft(folder, tensors, config)


NAMES = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def single_adapter(
    folder: Path,
    seed: int = 7,
    kind: str = "mixtral",
    *,
    experts: Iterable[int] = range(EXPERTS),
    parts: Iterable[int] = range(3),
    prefix: str = WHERE,
    attention: bool = True,
) -> Path:
    owner, ends = NAMES[kind]
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    modules = {
        f"{prefix}{owner}.{e}.{ends[p]}": factors(*shapes[p], 1000 * seed + 10 * e + p) for e in experts for p in parts
    }
    if attention:
        modules[f"{prefix}self_attn.q_proj"] = factors(HIDDEN, HIDDEN, 1000 * seed + 999)
    config = make_config(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", *ends], lora_dropout=0.0)
    return write_peft(folder, peft_tensors(modules), config)


def fused_deltas(folder: Path) -> dict[str, Tensor]:
    """``{parameter[e] or module: ΔW}``, by plain algebra, in float64: what the files of either kind say."""
    adapter = fl.load(folder)
    deltas: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for module in adapter.modules:
        delta = adapter.delta(module).double()
        owner, _, end = module.rpartition(".")
        if ".experts." not in module or "[" in module:
            deltas[module] = delta
            continue
        where, _, e = owner.rpartition(".")
        gated = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}.get(end, "down")
        parts.setdefault((where.replace("block_sparse_moe", "mlp"), e), {})[gated] = delta
    for (where, e), found in parts.items():
        zero = torch.zeros(INNER, HIDDEN, dtype=torch.float64)
        if "gate" in found or "up" in found:
            deltas[f"{where}.gate_up_proj[{e}]"] = torch.cat([found.get("gate", zero), found.get("up", zero)])
        if "down" in found:
            deltas[f"{where}.down_proj[{e}]"] = found["down"]
    return deltas


def combined(terms: Iterable[tuple[float, Path]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, folder in terms:
        for module, delta in fused_deltas(folder).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def assert_is(adapter: Any, expected: Mapping[str, Tensor], relative: float = FLOAT32) -> None:
    """An adapter in the fused form alone, with these updates."""
    assert set(adapter.modules) == set(expected)
    for module, delta in expected.items():
        scale = float(delta.abs().max()) or 1.0
        torch.testing.assert_close(adapter.delta(module).double(), delta, rtol=0, atol=10 * relative * scale)


def changes(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What an adapter that peft loads changes in the weights of a model."""
    import copy

    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload()
    before = model.state_dict()
    return {k: w - before[k] for k, w in merged.state_dict().items() if not torch.equal(w, before[k])}


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=60, num_local_experts=EXPERTS,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)  # type: ignore[no-any-return]
