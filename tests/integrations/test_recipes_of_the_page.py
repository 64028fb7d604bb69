"""The code of docs/integrations.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[str]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def tiny() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two trained adapters on the same modules, which share no direction; saved in ``adapters`` too."""
    model = get_peft_model(tiny(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), "legal")
    model.add_adapter("med", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for key, value in model.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(value, std=0.2)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("adapters")
    return model


def test_peft(model: Any) -> None:
    names: dict[str, Any] = {"model": model}
    found = blocks("PEFT")
    for block in found:
        exec(compile(block, "docs/integrations.md", "exec"), names)
    assert len(found) == 2 and Path("out/mix/adapter_config.json").exists()
    assert list(model.peft_config) == ["legal", "med", "mix", "shared", "unique_legal", "unique_med", "both"]
    assert model.active_adapter == "mix"


def test_transformers(model: Any) -> None:
    names: dict[str, Any] = {"model": tiny()}
    (block,) = blocks("transformers")
    exec(compile(block, "docs/integrations.md", "exec"), names)
    assert Path("out/mix/adapter_config.json").exists()
    assert list(names["model"].peft_config) == ["legal", "med", "mix"]
