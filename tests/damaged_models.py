"""Models that nothing can be applied to: damaged, cut off, quantised; and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from stored_models import adapter, model_file
from torch import Tensor

import fastlora as fl

Q = "model.layers.0.self_attn.q_proj"

FLOAT8 = torch.float8_e4m3fn
CODED: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "gptq": (
        {"qweight": torch.zeros(1, 8, dtype=torch.int32), "qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "scales": torch.ones(1, 8).half(), "g_idx": torch.zeros(8, dtype=torch.int32)},
        {"quant_method": "gptq", "bits": 4}, "GPTQ",
    ),
    "awq": (
        {"qweight": torch.zeros(8, 1, dtype=torch.int32), "qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "scales": torch.ones(1, 8).half()},
        {"quant_method": "awq", "bits": 4}, "AWQ",
    ),
    "bitsandbytes, 4 bit": (
        {"weight": torch.zeros(32, 1, dtype=torch.uint8), "weight.absmax": torch.zeros(1),
         "weight.quant_map": torch.zeros(16),
         "weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit",
    ),
    "bitsandbytes, 8 bit": (
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.ones(8)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit",
    ),
    "fp8 with block scales": (
        {"weight": torch.ones(8, 8).to(FLOAT8), "weight_scale_inv": torch.ones(1, 1)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8 with a scale",
    ),
}  # fmt: skip


def quantised(folder: Path, coded: str) -> None:
    """A model whose only weight is coded."""
    tensors, quantisation, _ = CODED[coded]
    folder.mkdir()
    save_file({f"{Q}.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantisation}))


def shards(tmp_path: Path) -> tuple[Path, fl.Adapter]:
    folder = tmp_path / "base"
    folder.mkdir()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    places = {f"{name}.weight": f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for name, file in places.items():
        model_file(folder / file, {name: (8, 8)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, adapter("x", dict.fromkeys(names, (8, 8)))


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def absent_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def file_elsewhere(folder: Path) -> None:
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(text.replace("model-00002", "../model-00002"))


def cut_off(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def other_shape(folder: Path) -> None:
    model_file(folder / "model-00002-of-00002.safetensors", {"model.layers.1.self_attn.q_proj.weight": (8, 10)})


def false_shape(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[8,8]", b"[8,9]"))


def no_numbers(folder: Path) -> None:
    save_file(
        {"model.layers.1.self_attn.q_proj.weight": torch.full((8, 8), torch.nan)},
        folder / "model-00002-of-00002.safetensors",
    )


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors"),
    "absent tensor": (absent_tensor, "lacks model.norm.weight"),
    "file elsewhere": (file_elsewhere, "not in its own directory"),
    "cut off": (cut_off, "cut off"),
    "other shape": (other_shape, "of another base model"),
    "false shape": (false_shape, "no readable safetensors file"),
    "no numbers": (no_numbers, "would hold NaN or infinity"),
}
