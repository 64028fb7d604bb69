"""PEFT directories: ``adapter_config.json`` beside ``adapter_model.safetensors``, of LoRA and (IA)³ adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, Ia3Data, LoraData
from fastlora.core.names import CONFIG_NAME
from fastlora.engine.contracts import Sink
from fastlora.formats.peft import ia3, reading
from fastlora.formats.peft.config import read_fields
from fastlora.formats.peft.writing import AdapterFile

WRITES = (LoraData, Ia3Data)


def detects(path: Path) -> bool:
    """Whether a path is such a directory."""
    return path.is_dir() and (path / CONFIG_NAME).exists()


def read(path: Path, name: str) -> AdapterData:
    """The LoRA or (IA)³ adapter in a directory; its tensors are views of the mapped file."""
    fields = read_fields(path)
    if fields.values.get("peft_type") == "IA3":
        return ia3.read(path, name, fields)
    return reading.read(path, name, fields)


def sink(directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Sink:
    """The files of a LoRA adapter, to be filled by the engine."""
    return AdapterFile(directory, adapter, outlines, dtype)


def write(directory: Path, record: AdapterData, dtype: torch.dtype | str | None) -> None:
    """Writes what needs no kernels into a directory that is being staged."""
    assert isinstance(record, Ia3Data)
    ia3.write(directory, record, dtype)
