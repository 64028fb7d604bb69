"""PEFT directories: ``adapter_config.json`` beside ``adapter_model.safetensors``, of LoRA and (IA)³ adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, DoraData, Ia3Data, LoraData
from fastlora.core.inert import note_on_zeros
from fastlora.core.names import CARD_NAME, CONFIG_NAME, check_name
from fastlora.engine.contracts import Sink
from fastlora.files.tensor_files import map_safetensors
from fastlora.formats.peft import dora, ia3, reading
from fastlora.formats.peft.alike import LARGEST_KNOWN, recipe_of
from fastlora.formats.peft.beside import note_on_files
from fastlora.formats.peft.config import fields_of, read_configuration
from fastlora.formats.peft.missing import note_on_modules
from fastlora.formats.peft.names import MLX_WEIGHTS_NAME, WEIGHTS_NAME
from fastlora.formats.peft.ranks import with_readable_ranks
from fastlora.formats.peft.whole import whole_files as whole_files
from fastlora.formats.peft.writing import AdapterFile
from fastlora.runtime.system import open_to_read

WRITES = (LoraData, DoraData, Ia3Data)

USUAL_FILES = {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
"""All that a directory of an adapter holds that is read without a look around."""


def detects(path: Path) -> bool:
    """Whether a path is such a directory."""
    return path.is_dir() and os.path.lexists(path / CONFIG_NAME)  # a link to nowhere is told by the reader


def is_certain(path: Path) -> bool:
    """Whether a path is a folder with both files that PEFT writes, and without that of MLX."""
    config, weights, other = (os.path.join(path, name) for name in (CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME))
    return os.path.exists(config) and os.path.exists(weights) and not os.path.lexists(other)


def read(path: Path, name: str) -> AdapterData:
    """The LoRA, DoRA or (IA)³ adapter in a directory; its tensors are views of the mapped file."""
    fields = fields_of(path / CONFIG_NAME, read_configuration(path / CONFIG_NAME))
    if fields.values.get("peft_type") == "IA3":
        scalings = ia3.read(path, name, fields)
        told = [*ia3.note_on_ones(scalings), *note_on_modules(scalings), *note_on_files(path, name)]
        return replace(scalings, notes=(*scalings.notes, *told))
    adapter = reading.read(path, name, fields)
    zeros = note_on_zeros(name, adapter.updates.values(), with_extras=bool(adapter.extras))
    told = [*zeros, *note_on_modules(adapter), *note_on_files(path, name)]
    return replace(adapter, notes=(*adapter.notes, *told)) if told else adapter


def read_alike(path: str, name: str) -> LoraData | None:
    """The adapter in a directory that is like one that was read before, with as few questions to the system as there
    are; ``None`` where :func:`read` has to look. Says what :func:`read` says, and refuses what it refuses."""
    try:
        with os.scandir(path) as entries:
            kinds = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except (OSError, ValueError):
        return None
    # Other files may be worth telling.
    if kinds.keys() - USUAL_FILES or not (kinds.get(CONFIG_NAME) and kinds.get(WEIGHTS_NAME)):
        return None
    try:
        file = open_to_read(os.path.join(path, CONFIG_NAME))
        try:
            raw = os.read(file, LARGEST_KNOWN)
        finally:
            os.close(file)
    except OSError:
        return None
    recipe = recipe_of(raw)
    if recipe is None:
        return None
    check_name(name)
    adapter = recipe.adapter(name, map_safetensors(os.path.join(path, WEIGHTS_NAME), is_file=True))
    if adapter is None:
        return None
    told = note_on_modules(adapter)
    return replace(adapter, notes=tuple(told)) if told else adapter


def ready(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter at the ranks that PEFT can read."""
    return with_readable_ranks(adapter, uniform_rank)


def sink(directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> Sink:
    """The files of a LoRA adapter, to be filled by the engine."""
    return AdapterFile(directory, adapter, outlines, dtype)


def write(directory: Path, record: AdapterData, dtype: torch.dtype | str | None) -> None:
    """Writes what needs no kernels into a directory that is being staged."""
    if isinstance(record, DoraData):
        dora.write(directory, record, dtype)
        return
    assert isinstance(record, Ia3Data)
    ia3.write(directory, record, dtype)
