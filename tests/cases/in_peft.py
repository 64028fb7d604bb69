"""Small models and adapters, and what peft makes of adapters that it loads."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PREFIX, write_peft
from safetensors.torch import load_file
from tolerances import SUMS32
from torch import Tensor, nn

from fastlora.cli.app import app

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(*arguments: str | Path) -> None:
    """A command that must succeed."""
    app([str(a) for a in arguments], standalone_mode=False)


def llava() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=64))  # type: ignore[no-any-return]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES | {"intermediate_size": 12}, num_key_value_heads=2, vocab_size=60, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)  # type: ignore[no-any-return]


def older_llava_name(key: str) -> str:
    """The name that older model code gave a tensor."""
    return key.replace("model.language_model.", "language_model.model.").replace(
        "model.vision_tower.", "vision_tower.vision_model."
    )


def trained(
    model: nn.Module, folder: Path, seed: int = 1, keep: Callable[[str], bool] = lambda key: True, **config: Any
) -> Path:
    """An adapter that peft saved, with random factors; under the names ``keep`` leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        rng = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=rng) * keep(name)
        adapted.save_pretrained(folder)
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    """The adapter under other names of its tensors; the configuration stays."""
    tensors = {PREFIX + rename(k.removeprefix(PREFIX)): t for k, t in load_file(folder / WEIGHTS).items()}
    return write_peft(folder.with_name(folder.name + "-renamed"), tensors, json.loads((folder / CONFIG).read_text()))


def changes(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What an adapter that peft loads changes in the weights of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload()
    before = model.state_dict()
    return {k: w - before[k] for k, w in merged.state_dict().items() if not torch.equal(w, before[k])}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=SUMS32 * float(change.abs().max()))
