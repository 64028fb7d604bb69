"""Small models as they are stored, and adapters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import gaussian
from safetensors.torch import save_file
from torch import Tensor

import fastlora as fl
from fastlora.core.factors import Factor
from fastlora.core.updates import Update


def llama(**settings: Any) -> Any:
    """A model of transformers with random weights."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = {**sizes, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False, **settings}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))


def adapter(name: str, modules: dict[str, tuple[int, int]], seed: int = 0) -> fl.Adapter:
    """A random adapter of rank 3."""
    updates = {}
    for i, (module, (n, m)) in enumerate(modules.items()):
        B, A = (
            gaussian(n, 3, seed=seed + i, dtype=torch.float32),
            gaussian(3, m, seed=seed + 50 + i, dtype=torch.float32),
        )
        updates[module] = Update(Factor.of("B", B), Factor.of("A", A), 0.5)
    return fl.Adapter(name, updates)


def model_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Writes random tensors of these shapes, and returns them."""
    stored = {}
    for i, (name, shape) in enumerate(shapes.items()):
        stored[name] = gaussian(*(shape or (1,)), seed=7 + i).view(shape).to(dtype)
    save_file(stored, path, {"format": "pt"})
    return stored
