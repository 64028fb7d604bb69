"""Damaged PEFT directories, tensors that do not fit, and wrong paths: one clear message each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import PREFIX, make_adapter, make_config, make_factors, peft_tensors, write_peft
from safetensors.torch import save_file
from torch import Tensor

from fastlora.adapters.loading import load
from fastlora.errors import InputError, UnsupportedAdapter

Q = "model.layers.0.self_attn.q_proj"


def replaced(key: str, tensor: Tensor | None) -> Callable[[Path], None]:
    """A file in which one tensor is another, or missing."""

    def apply(directory: Path) -> None:
        tensors = peft_tensors(make_factors())
        tensors.pop(f"{PREFIX}{key}", None)
        if tensor is not None:
            tensors[f"{PREFIX}{key}"] = tensor
        save_file(tensors, directory / "adapter_model.safetensors")

    return apply


def raw(name: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)

    return apply


def cut_off(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_torch_file(content: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "adapter_model.safetensors").unlink()
        (directory / "adapter_model.bin").write_bytes(content)

    return apply


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (raw(CONFIG, None), "adapter_config.json"),
    "configuration is no JSON": (raw(CONFIG, b"{'r': 8}"), "not valid JSON"),
    "configuration is no text": (raw(CONFIG, b"\xff\xfe\x00"), "not valid JSON"),
    "configuration is a list": (raw(CONFIG, b"[]"), "an object with fields"),
    "no weights": (raw(WEIGHTS, None), "neither adapter_model.safetensors nor adapter_model.bin"),
    "weights are empty": (raw(WEIGHTS, b""), "no readable safetensors"),
    "weights are garbage": (raw(WEIGHTS, b"garbage" * 50), "no readable safetensors"),
    "weights are cut off": (cut_off, "cut off"),
    "weights are a pointer": (raw(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "torch file is garbage": (only_torch_file(b"garbage" * 50), "no readable file of tensors"),
    "torch file is empty": (only_torch_file(b""), "no readable file of tensors"),
    "A without B": (replaced(B, None), r"q_proj\.lora_A\.weight' has no lora_B"),
    "B without A": (replaced(A, None), r"q_proj\.lora_B\.weight' has no lora_A"),
    "ranks of A and B differ": (replaced(B, torch.zeros(24, 5)), "4 and 5 must agree"),
    "A is a vector": (replaced(A, torch.zeros(16)), r"lora_A \[16\]"),
    "A is sharded away": (replaced(A, torch.zeros(0)), "ZeRO-3"),
    "A is of integers": (replaced(A, torch.zeros(4, 16, dtype=torch.int8)), "int8"),
    "A is float8": (replaced(A, torch.zeros(4, 16).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "A is complex": (replaced(A, torch.zeros(4, 16, dtype=torch.complex64)), "complex64"),
    "lora_bias of another length": (replaced(f"{Q}.lora_B.bias", torch.zeros(5)), r"\[24\]"),
    "unknown tensor": (replaced("model.norm.weight", torch.zeros(5)), "unknown kind: 'model.norm.weight'"),
    "bias without the field": (replaced("model.norm.bias", torch.zeros(5)), "unknown kind"),
    "adapter name in the tensor": (
        replaced(f"{Q}.lora_A.default.weight", torch.zeros(4, 16)),
        "lora_A.default.weight.*other factors of that module carry none",
    ),
    "DoRA tensors": (replaced(f"{Q}.lora_magnitude_vector", torch.zeros(24)), "DoRA"),
    "trained tokens": (
        replaced("embed_tokens.token_adapter.trainable_tokens_delta", torch.zeros(2, 4)),
        "token",
    ),
    "nested without parameters": (
        replaced(f"{Q}.base_layer.lora_A.weight", torch.zeros(4, 16)),
        "target_parameters.*names none",
    ),
    "a factor of no module": (replaced("lora_A.weight", torch.zeros(4, 16)), "unknown kind: 'lora_A.weight'"),
    "multi-head attention": (
        replaced("attn.base_layer.out_proj.lora_A.weight", torch.zeros(4, 16)),
        "MultiheadAttention",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damaged_directories(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    directory = make_adapter(tmp_path / "a")
    damage(directory)
    with pytest.raises(InputError, match=words) as caught:
        load(directory)
    one_message(caught.value, directory)


def one_message(error: InputError, directory: Path) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 900
    assert str(directory) in text or "tensor" in text, f"does not say where: {text}"
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def test_no_factors_at_all(tmp_path: Path) -> None:
    config = make_config(modules_to_save=["head"])
    with pytest.raises(InputError, match="is empty"):
        load(write_peft(tmp_path / "a", {f"{PREFIX}head.weight": torch.zeros(2, 2)}, config))


def test_grouped_convolution(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.zeros(4, 6, 3, 3),
        f"{PREFIX}conv.lora_B.weight": torch.zeros(10, 2, 1, 1),
    }
    with pytest.raises(UnsupportedAdapter, match="grouped convolution"):
        load(write_peft(tmp_path / "a", tensors))


def test_wrong_paths(tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "pool" / "a")
    make_adapter(tmp_path / "pool" / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "single.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    partial = make_adapter(tmp_path / ".out.partial-12" / "shared")
    for path, words in {
        tmp_path / "nowhere": "there is no",
        directory / WEIGHTS: "pass its directory",
        tmp_path / "pool": "holds 2 adapters",
        tmp_path / "empty": "found: nothing",
        tmp_path / "model": "whole model",
        tmp_path / "single.safetensors": "no readable safetensors file",
        tmp_path / "notes.txt": "is a file",
        partial: "never finished",
    }.items():
        with pytest.raises(InputError, match=words):
            load(path)
