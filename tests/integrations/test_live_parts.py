"""Shared and unique parts, slots, and peft's own method replaced, on live models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import (
    IDS,
    Net,
    adapted,
    deltas,
    dense_outputs,
    factors,
    fingerprint,
    ia3,
    largest_error,
    layers,
    lora,
    outputs,
    weighted,
)
from peft import LoraConfig, PeftModel
from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

import fastlora as fl
from fastlora.integrations import peft as live
from tests.tolerances import SUMS32

WEIGHTS = {"a": 0.7, "b": -0.4}


def test_shared_and_unique_parts_add_up() -> None:
    model = adapted({"a": lora(5), "b": lora(4, use_rslora=True), "other": lora(2)})
    parts = live.decompose_adapters(model, ["a", "b"], prefix="p_", threshold=0.2)
    assert list(model.peft_config) == ["a", "b", "other", "p_shared", "p_unique_a", "p_unique_b"]
    for name in ("a", "b"):
        unique, own = deltas(model, f"p_unique_{name}"), deltas(model, name)
        shared = {p: parts.shared_of(name).delta(p).double() for p in parts.shared_of(name)}
        whole = {p: unique.get(p, torch.zeros(())) + shared.get(p, torch.zeros(())) for p in own}
        assert largest_error(whole, own) < SUMS32
    made = fl.decompose(live.pool(model, ["a", "b"]), threshold=0.2)
    wanted = {p: made.shared.delta(p).double() for p, u in made.shared.updates.items() if u.rank}
    assert largest_error(deltas(model, "p_shared"), wanted) < SUMS32


def test_a_part_that_is_zero_is_there() -> None:
    model = adapted({n: lora(2, targets=["up", "conv2"]) for n in "ab"})
    live.decompose_adapters(model, threshold=0.99)
    assert all(not d.any() for d in deltas(model, "shared").values()) and deltas(model, "shared")
    with torch.no_grad():
        assert torch.equal(outputs(model, "shared"), Net().eval()(IDS).double())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slot_takes_other_numbers_in_the_same_tensors(compiled: bool, tmp_path: Path) -> None:
    targets = ["up", "down", "conv2"]
    slot = lora(8, 3, targets=targets, use_rslora=True, rank_pattern={"down": 9}, lora_dropout=0.1)
    model = adapted({"slot": slot, "a": lora(4, targets=targets), "b": lora(3, targets=["up"])})
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=10)
        assert isinstance(layers(model)["up"].scaling["slot"], torch.Tensor)
    wanted, others = weighted(model, WEIGHTS), (deltas(model, "a"), deltas(model, "b"))
    held = {p: tuple(map(id, factors(layer, "slot"))) for p, layer in layers(model).items()}
    scalings = {p: type(layer.scaling["slot"]) for p, layer in layers(model).items()}
    live.swap(model, fl.merge(live.pool(model, ["a", "b"]), WEIGHTS, rank=8), "slot")  # of 4 + 3, whole
    assert {p: tuple(map(id, factors(layer, "slot"))) for p, layer in layers(model).items()} == held
    assert {p: type(layer.scaling["slot"]) for p, layer in layers(model).items()} == scalings
    expected = dense_outputs(wanted)
    torch.testing.assert_close(outputs(model, "slot"), expected, rtol=SUMS32, atol=SUMS32)
    for name, before in zip("ab", others, strict=True):
        assert all(torch.equal(deltas(model, name)[p], d) for p, d in before.items())
    assert largest_error(
        {p: live.pool(model, ["slot"], "config")["slot"].delta(p).double() for p in wanted}, wanted
    ) < SUMS32  # fmt: skip
    if not compiled:
        model.save_pretrained(tmp_path, selected_adapters=["slot"])
        again = PeftModel.from_pretrained(Net().eval(), tmp_path / "slot")
        torch.testing.assert_close(outputs(again, "default"), expected, rtol=SUMS32, atol=SUMS32)


def test_modules_that_a_new_adapter_lacks_are_zero_in_a_slot() -> None:
    model = adapted({"slot": lora(4), "a": lora(2, targets=["up", "emb"])})
    live.swap(model, live.pool(model)["a"], "slot")
    found = deltas(model, "slot")
    assert largest_error({p: found.pop(p) for p in ("up", "emb")}, deltas(model, "a")) < SUMS32
    assert not any(d.any() for d in found.values())


def test_peft_itself_is_replaced_and_put_back() -> None:
    """rsLoRA first is where peft is wrong by √r."""
    originals = LoraModel.add_weighted_adapter, IA3Model.add_weighted_adapter
    model = adapted({"a": lora(use_rslora=True), "b": lora()})
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "peft", combination_type="cat")
    assert math.isclose(largest_error(deltas(model, "peft"), weighted(model, WEIGHTS)), math.sqrt(8) - 1, rel_tol=0.2)
    live.install()
    try:
        live.install()
        assert LoraModel.add_weighted_adapter is not originals[0]
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "ours", combination_type="cat")
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "again", "svd", 2)
        assert largest_error(deltas(model, "ours"), weighted(model, WEIGHTS)) < SUMS32
        with pytest.raises(ValueError, match="Invalid combination_type: next_year"):  # peft's own words
            model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "no", combination_type="next_year")
        scaled = adapted({n: ia3(["up"], []) for n in "ab"})
        scaled.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
        held = layers(scaled)["up"].ia3_l
        torch.testing.assert_close(held["sum"], held["a"] + held["b"] - 1, rtol=SUMS32, atol=SUMS32)
    finally:
        live.uninstall()
    assert (LoraModel.add_weighted_adapter, IA3Model.add_weighted_adapter) == originals
    live.uninstall()
    assert "no" not in model.peft_config


def test_what_replaced_it_since_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    live.install()
    ours = LoraModel.add_weighted_adapter
    with monkeypatch.context() as other:
        other.setattr(LoraModel, "add_weighted_adapter", lambda *_: None)
        with pytest.raises(fl.InputError, match="was replaced again"):
            live.uninstall()
    assert LoraModel.add_weighted_adapter is ours
    live.uninstall()


def test_bare_models_take_adapters_and_stay_as_they_were() -> None:
    """As parts of pipelines are: no PeftModel, a ``peft_config`` after the first adapter."""
    model = adapted({"a": lora(), "b": lora(3)})
    pool = live.pool(model)
    bare = Net().eval()
    before = {k: (id(p), p.requires_grad) for k, p in bare.named_parameters()}
    live.write(bare, pool["a"])
    live.write(bare, pool["b"], "second")
    kept = {k.replace(".base_layer", ""): (id(p), p.requires_grad) for k, p in bare.named_parameters()}
    assert before.items() <= kept.items()
    live.add_weighted_adapter(bare, ["a", "second"], [0.7, -0.4], "mix", "svd", 12)
    torch.testing.assert_close(outputs(bare, "mix"), dense_outputs(weighted(model, WEIGHTS)), rtol=SUMS32, atol=SUMS32)
    assert {tuple(layer.active_adapters) for layer in layers(bare).values()} == {("a",)}
    state = fingerprint(bare)
    with pytest.raises(fl.InputError, match="already"):
        live.write(bare, pool["a"])
    assert repr(fingerprint(bare)) == repr(state)
    assert isinstance(bare.peft_config["mix"], LoraConfig)


def test_a_module_whose_path_ends_another_is_the_only_one_that_is_adapted(tmp_path: Path) -> None:
    """``up`` would select ``inner.up`` too where the saved adapter is loaded."""

    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

    model = adapted({"a": lora(targets="up")}, net=Twice())
    live.write(model, live.read(model, "a"), "twin")
    assert set(deltas(model, "twin")) == {"up"}
    model.save_pretrained(tmp_path, selected_adapters=["twin"])
    again = PeftModel.from_pretrained(Twice(), tmp_path / "twin")
    assert set(deltas(again, "default")) == {"up"}


def test_transposed_weights() -> None:
    """GPT-2's ``Conv1D``, whose weight is ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    class Transposed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.proj = Conv1D(6, 4)

        def forward(self, x: Any) -> Any:
            return self.proj(x)

    names: dict[str, Any] = {n: LoraConfig(r=2, target_modules=["proj"], fan_in_fan_out=True) for n in "ab"}
    model = adapted(names, net=Transposed())
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "mix", "svd", 3)
    assert model.peft_config["mix"].fan_in_fan_out
    wanted = weighted(model, WEIGHTS)["proj"]
    U, S, Vh = torch.linalg.svd(wanted)
    weight = Transposed().proj.weight.detach().double() + ((U[:, :3] * S[:3]) @ Vh[:3]).mT
    x = torch.randn(5, 4)
    model.set_adapter("mix")
    torch.testing.assert_close(model(x).double(), x.double() @ weight, rtol=SUMS32, atol=SUMS32)


def test_a_task_whose_head_is_not_written_is_not_named(tmp_path: Path) -> None:
    """peft would look for a trained head in the saved adapter, and make a new one."""
    model = adapted({n: lora(targets=["up"], task_type=None) for n in "ab"})
    model.peft_config["a"].task_type = model.peft_config["b"].task_type = "SEQ_CLS"
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "mix", "cat")
    live.write(model, fl.merge(live.pool(model, ["a", "b"]), WEIGHTS, method="cat"), "same")
    assert model.peft_config["mix"].task_type is model.peft_config["same"].task_type is None
    model.peft_config["a"].task_type = model.peft_config["b"].task_type = "CAUSAL_LM"
    live.add_weighted_adapter(model, ["a", "b"], [0.7, -0.4], "kept", "cat")
    assert model.peft_config["kept"].task_type == "CAUSAL_LM"


def test_a_number_that_a_slot_cannot_hold_is_refused() -> None:
    model = adapted({n: lora(2, targets=["up"]) for n in ("slot", "a")}, torch.float16)
    before = fingerprint(model)
    with pytest.raises(fl.InputError, match="NaN or Inf"):
        live.swap(model, 1e6 * live.pool(model)["a"] * 1e6, "slot")
    assert repr(fingerprint(model)) == repr(before)
