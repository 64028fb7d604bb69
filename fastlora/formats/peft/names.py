"""How PEFT calls files, tensors and modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
MLX_WEIGHTS_NAME = "adapters.safetensors"
"""Where it lies, the folder may be one of MLX."""
PREFIX = "base_model.model."
WRAPPED = ".base_layer"
"""What a wrapped module is called inside its wrapper."""

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains and saves beside the adapter because of the task alone."""

REGISTRATION_ORDER = ("gate_up_proj", "gate_up_proj_bias", "w1", "v1", "w2", "down_proj", "down_proj_bias")
"""The order in which mixture-of-experts modules create their parameters: PEFT wraps the last one outermost,
and the file does not say which parameter a wrapper belongs to."""


def block_tail(path: str) -> str:
    """The path from its first numbered block on: ``layers.0.mlp.up_proj``. Newer model code often puts the blocks
    elsewhere, and PEFT translates the names of tensors, but not those in a configuration."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(0, number - 1) :])


def exact_pattern(module: str) -> str:
    """A pattern that PEFT matches with this module and no other."""
    return "^" + re.escape(module)


def saved_module(path: str, names: Iterable[str]) -> str | None:
    """The first of ``names`` that is the end of a module that holds the parameter ``path``."""
    parts = path.split(".")[:-1]
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((n for n in names if any(p.endswith(n) for p in parents)), None)
