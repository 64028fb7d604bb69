"""Models of transformers that loaded their adapters themselves, without a ``PeftModel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import deltas, fingerprint, largest_error, weighted
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora as fl
from fastlora.integrations import transformers as live
from tests.tolerances import SUMS32

IDS = torch.arange(9)[None]


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), "legal")
    model.add_adapter("med", LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True))
    for key, value in model.named_parameters():
        if ".lora_" in key:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(tmp_path)
    return {name: tmp_path / name for name in ("legal", "med")}


def test_adapters_that_the_model_loaded_are_merged_in_place(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny()
    for name, folder in folders.items():
        model.load_adapter(str(folder), adapter_name=name)
    live.set_adapter(model, "legal")
    live.add_weighted_adapter(model, ["legal", "med"], [0.7, -0.4], "mix", "cat")
    assert live.active_adapters(model) == ["legal"] and list(model.peft_config) == ["legal", "med", "mix"]
    wanted = weighted(model, {"legal": 0.7, "med": -0.4})
    assert largest_error(deltas(model, "mix"), wanted) < SUMS32
    live.set_adapter(model, "mix")
    with torch.no_grad():
        logits = model(IDS).logits
    live.read(model, "mix").save(tmp_path / "mix")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "mix").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits, rtol=SUMS32, atol=SUMS32)
    other = tiny()
    other.load_adapter(str(tmp_path / "mix"), adapter_name="mix")
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, logits, rtol=SUMS32, atol=SUMS32)


def test_an_adapter_goes_into_a_plain_model_and_out_again(folders: dict[str, Path]) -> None:
    model = tiny()
    with torch.no_grad():
        plain = model(IDS).logits
    before = fingerprint(model)
    with pytest.raises(fl.InputError, match="it has none"):
        live.set_adapter(model, "mix")
    mix = fl.merge(fl.Pool.load(folders), {"legal": 0.7, "med": -0.4}, method="cat")
    live.write(model, mix, "mix", activate=True)
    assert model._hf_peft_config_loaded and live.active_adapters(model) == ["mix"]
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, plain)
    live.delete_adapter(model, "mix")
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)
    assert before["model.embed_tokens.weight"] == fingerprint(model)["model.embed_tokens.weight"]


def test_a_name_that_is_not_there(folders: dict[str, Path]) -> None:
    model = tiny()
    model.load_adapter(str(folders["legal"]), adapter_name="legal")
    for call in (live.set_adapter, live.delete_adapter, live.read):
        with pytest.raises(fl.InputError, match="no adapter 'med'; it has legal"):
            call(model, "med")
