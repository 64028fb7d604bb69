"""What the formats of single files have in common. They differ in how they are told apart
(:mod:`fastlora.dialects.looks`), and in their styles (:mod:`fastlora.dialects.spelling`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, DoraData, LoraData
from fastlora.dialects.single_file import read_file
from fastlora.dialects.writing import SingleFile, laid_out
from fastlora.engine.contracts import Sink
from fastlora.files.tensor_files import SAFETENSORS

SINGLE_FILES = True
SUFFIX = SAFETENSORS
WRITES: tuple[type[AdapterData], ...] = ()  # through the form of the adapter


def read(path: Path, name: str, *, family: str | None = None, rank: int | None = None) -> LoraData | DoraData:
    """The adapter in a single file; see :func:`fastlora.dialects.single_file.read_file`."""
    return read_file(path, name, family=family, rank=rank)


def ready(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter as its file has it; see :func:`fastlora.dialects.writing.laid_out`."""
    return laid_out(adapter, uniform_rank)


def sink(path: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Sink:
    """The file, to be filled by the engine."""
    return SingleFile(path, adapter, dtype)
