"""Folders of MLX: ``adapters.safetensors`` beside an ``adapter_config.json`` with ``lora_parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, LoraData
from fastlora.engine.contracts import Sink
from fastlora.formats.mlx.reading import detects, is_config, read
from fastlora.formats.mlx.writing import MlxFolder, as_written

__all__ = ["WRITES", "detects", "is_config", "read", "ready", "sink"]

WRITES: tuple[type[AdapterData], ...] = ()  # only what is from such a folder, or is asked for by the name of the format


def ready(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter at one rank, with the scale that all of its modules share beside the factors."""
    return as_written(adapter, uniform_rank)


def sink(directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Sink:
    """The files of such a folder, to be filled by the engine."""
    return MlxFolder(directory, adapter, dtype)
