"""Adapters in the weights of base models: against peft's own merges, and tensor by tensor against dense sums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored_models import adapter, llama, model_file
from tolerances import FLOAT32

import fastlora as fl

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Model = Any


def gpt2() -> Model:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> Model:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def clip() -> Model:
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    return transformers.CLIPTextModel(config)


LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: dict[str, tuple[Callable[[], Model], dict[str, Any], torch.dtype]] = {
    "llama": (llama, LINEAR, torch.float32),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "o_proj"]}, torch.float32),
    "whole": (llama, {**LINEAR, "modules_to_save": ["lm_head"]}, torch.float32),
    "dora": (llama, {**LINEAR, "use_dora": True}, torch.float32),
    "dora bf16": (llama, {**LINEAR, "use_dora": True}, torch.bfloat16),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, torch.float32),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, torch.float32),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj",
                "mlp.experts.down_proj"]}, torch.float32),
    "clip": (clip, {"target_modules": ["q_proj", "fc1"]}, torch.float32),
}  # fmt: skip


ROUNDED_ONCE: dict[str, tuple[Callable[[], Model], dict[str, Any], torch.dtype]] = {
    "llama": (llama, LINEAR, torch.bfloat16),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, torch.bfloat16),
    "gpt2": (*CASES["gpt2"][:2], torch.bfloat16),
    "clip": (*CASES["clip"][:2], torch.bfloat16),
}
EXPERTS = *CASES["mixtral"][:2], torch.bfloat16


def saved(root: Path, case: tuple[Callable[[], Model], dict[str, Any], torch.dtype], *, halves: bool = False) -> Model:
    """``base`` in several shards and ``adapter``; the model of peft. ``halves``: the adapter has the model's dtype."""
    make, settings, dtype = case
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(root / "base", max_shard_size="20KB")
    (root / "base" / "tokenizer.json").write_text("{}")
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not halves)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.save_pretrained(root / "adapter")
    return wrapped


@pytest.mark.parametrize("case", CASES)
def test_equal_to_a_merge_of_peft(case: str, tmp_path: Path) -> None:
    """One rounding more or less: peft rounds ``ΔW`` and the sum, or ``m/‖V‖`` on its way, in the model's dtype."""
    wrapped = saved(tmp_path, CASES[case])
    fl.apply(tmp_path / "base", fl.load(tmp_path / "adapter"), tmp_path / "out")
    merged = wrapped.merge_and_unload()
    found = type(merged).from_pretrained(tmp_path / "out", dtype=merged.dtype)
    before = type(merged).from_pretrained(tmp_path / "base", dtype=merged.dtype)
    wanted, old = dict(merged.named_parameters()), dict(before.named_parameters())
    eps = torch.finfo(merged.dtype).eps
    changed = 0
    for name, parameter in found.named_parameters():
        other = wanted[name].detach().double()
        least = 4 * eps * float(other.abs().max())
        torch.testing.assert_close(parameter.detach().double(), other, rtol=4 * eps, atol=least)
        changed += not torch.equal(parameter, old[name])
    assert changed >= 2
    inputs = torch.arange(6)[None]
    with torch.no_grad():
        one, other = (m.eval()(inputs)[0].double() for m in (found, merged))
    torch.testing.assert_close(one, other, rtol=0, atol=400 * eps * float(other.abs().max()))
    names = {p.name for p in (tmp_path / "base").iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert not list(tmp_path.glob(".*"))


def loaded(kind: Any, folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parameters of a model, and its logits or states."""
    model = kind.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        return {n: p.detach() for n, p in model.named_parameters()}, model(torch.arange(6)[None])[0]


@pytest.mark.parametrize("case", ROUNDED_ONCE)
def test_the_bits_of_a_merge_of_peft(case: str, tmp_path: Path) -> None:
    """peft trains adapters in float32 beside models in bfloat16. Then it rounds once, too, and tensors and logits are
    the same: the scaling is a power of two, so that it matters not whether factors or their product have it."""
    merged = saved(tmp_path, ROUNDED_ONCE[case]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    fl.apply(tmp_path / "base", fl.load(tmp_path / "adapter"), tmp_path / "out")
    (found, logits), (wanted, theirs), (base, before) = (
        loaded(type(merged), tmp_path / n) for n in ("out", "merged", "base")
    )
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert sum(not torch.equal(found[n], base[n]) for n in base) >= 2
    assert torch.equal(logits, theirs) and not torch.equal(logits, before)


@pytest.mark.parametrize("case", [*ROUNDED_ONCE, "experts"])
def test_nearer_than_a_merge_of_peft(case: str, tmp_path: Path) -> None:
    """peft rounds ``ΔW`` before it adds it where the adapter is in half precision, and to the dtype of the model where
    it changes experts that are stored together. No element of ours is further from the sum in float64."""
    halves = case != "experts"
    wrapped = saved(tmp_path, ROUNDED_ONCE.get(case, EXPERTS), halves=halves)
    fl.apply(tmp_path / "base", fl.load(tmp_path / "adapter"), tmp_path / "out")
    exact = dict(copy.deepcopy(wrapped).double().merge_and_unload().named_parameters())
    merged = wrapped.merge_and_unload()
    theirs, (ours, _) = dict(merged.named_parameters()), loaded(type(merged), tmp_path / "out")
    nearer = 0
    for name, wanted in exact.items():
        mine, other = ((x[name].detach().double() - wanted.detach()).abs() for x in (ours, theirs))
        assert bool((mine <= other + FLOAT32).all()), name
        assert bool((mine <= 0.51 * torch.finfo(torch.bfloat16).eps * wanted.detach().abs() + FLOAT32).all()), name
        nearer += int((mine + FLOAT32 < other).sum())
    assert nearer > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = model_file(tmp_path / "m.safetensors", {"a.weight": (40, 24), "b.weight": (5, 7), "c": (3,)}, dtype)
    pool = {n: adapter(n, {"a": (40, 24)}, seed) for n, seed in (("x", 1), ("y", 30))}
    fl.apply(tmp_path / "m.safetensors", {"x": 0.7, "y": -0.3}, tmp_path / "out.safetensors", pool=pool)
    found = load_file(tmp_path / "out.safetensors")
    wanted = stored["a.weight"].double() + sum(w * pool[n].delta("a").double() for n, w in (("x", 0.7), ("y", -0.3)))
    eps = torch.finfo(dtype).eps
    error = (found["a.weight"].double() - wanted).abs()
    assert bool((error <= 0.51 * eps * wanted.abs() + 0.1 * FLOAT32).all())  # elements are float32 beside halves
    assert torch.equal(found["b.weight"], stored["b.weight"]) and torch.equal(found["c"], stored["c"])


def test_fused_and_split_projections(tmp_path: Path) -> None:
    fused = model_file(
        tmp_path / "fused.safetensors",
        {"l.0.self_attn.qkv_proj.weight": (24, 8), "l.0.self_attn.o_proj.weight": (8, 8)},
    )
    split = adapter("s", {f"l.0.self_attn.{p}_proj": (8, 8) for p in "qkv"})
    fl.apply(tmp_path / "fused.safetensors", split, tmp_path / "one.safetensors")
    wanted = fused["l.0.self_attn.qkv_proj.weight"].double() + torch.cat(
        [split.delta(f"l.0.self_attn.{p}_proj").double() for p in "qkv"]
    )
    found = load_file(tmp_path / "one.safetensors")["l.0.self_attn.qkv_proj.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=FLOAT32)
    model_file(tmp_path / "split.safetensors", {f"l.0.self_attn.{p}_proj.weight": (8, 8) for p in "qkv"})
    whole = adapter("f", {"l.0.self_attn.qkv_proj": (24, 8)})
    fl.apply(tmp_path / "split.safetensors", whole, tmp_path / "two.safetensors")
    before, after = (load_file(tmp_path / f"{n}.safetensors") for n in ("split", "two"))
    change = torch.cat(
        [after[f"l.0.self_attn.{p}_proj.weight"].double() - before[f"l.0.self_attn.{p}_proj.weight"] for p in "qkv"]
    )
    torch.testing.assert_close(change, whole.delta("l.0.self_attn.qkv_proj").double(), rtol=0, atol=FLOAT32)


def test_ia3_scales_rows_columns_and_biases(tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "ia3" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    fl.apply(tmp_path / "base", fl.load(tmp_path / "adapter"), tmp_path / "out")
    wanted = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in type(model).from_pretrained(tmp_path / "out").named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=FLOAT32, atol=FLOAT32)


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    monkeypatch.chdir(tmp_path)
    fl.apply("base", adapter("x", {"model.layers.0.self_attn.q_proj": (32, 32)}), "out")
    assert {p.name for p in Path("out").iterdir()} == {p.name for p in Path("base").iterdir()} | {"README.md"}


def test_float16_does_not_overflow_in_silence(tmp_path: Path) -> None:
    model_file(tmp_path / "m.safetensors", {"a.weight": (8, 8)}, torch.float16)
    with pytest.raises(fl.OutputError, match="float16"):
        fl.apply(tmp_path / "m.safetensors", adapter("x", {"a": (8, 8)}) * 1e6, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
