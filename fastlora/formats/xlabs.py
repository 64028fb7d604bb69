"""Files of XLabs' scripts for Flux: ``double_blocks.0.processor.qkv_lora1.down.weight``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, DoraData, LoraData
from fastlora.dialects.looks import is_of
from fastlora.dialects.single_file import read_file
from fastlora.dialects.writing import SingleFile, laid_out
from fastlora.engine.contracts import Sink
from fastlora.files.tensor_files import SAFETENSORS

SINGLE_FILES = True
SUFFIX = SAFETENSORS
WRITES: tuple[type[AdapterData], ...] = ()  # through the form of the adapter


def detects(path: Path) -> bool:
    """Whether a path is such a file, or a folder that stands for one."""
    return is_of("xlabs", path)


def read(path: Path, name: str, *, family: str | None = None, rank: int | None = None) -> LoraData | DoraData:
    """The adapter in such a file; see :func:`fastlora.dialects.single_file.read_file`."""
    return read_file(path, name, family=family, rank=rank)


def ready(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter as such a file has it; see :func:`fastlora.dialects.writing.laid_out`."""
    return laid_out(adapter, uniform_rank)


def sink(path: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Sink:
    """Such a file, to be filled by the engine."""
    return SingleFile(path, adapter, dtype)
