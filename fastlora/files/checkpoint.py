"""A model as it is stored: its tensors, what its configuration says of them, and their values where they are scaled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from fastlora.errors import InputError
from fastlora.files.model_config import ModelConfig, read_model_config
from fastlora.files.quantised import Coding, find_coding, quantised_error, scaled
from fastlora.files.shards import (
    INDEX_SUFFIX,
    STEMS,
    ModelFiles,
    find_model,
    listed,
    read_index,
    refuse_shard,
)

V = TypeVar("V")

ModelSource = Mapping[str, Tensor] | str | os.PathLike[str]

WHOLE_NAMES = frozenset(stem + suffix for stem, suffix in STEMS)
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that compiling and sharding put into names."""
PEFT_NAMES = re.compile(r"\.lora_[AB]\.|\.lora_embedding_[AB]|\.base_layer\.|\.modules_to_save\.|\.original_module\.")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The tensors of a model, by name and as they are stored; :meth:`value` gives what they stand for.

    ``where``: what messages call it. ``config``: its configuration; ``None`` for bare tensors. ``notes``: what was left
    out while it was read.
    """

    where: str
    tensors: Mapping[str, Tensor]
    config: ModelConfig | None = None
    coding: Coding = field(default_factory=Coding)
    notes: tuple[str, ...] = ()

    def value(self, name: str) -> Tensor:
        """A tensor, multiplied out in float64 where it is scaled. Raises :class:`InputError` where it is codes."""
        reason = self.coding.refusal(name)
        if reason is not None:
            raise quantised_error(self.where, [(name, reason)])
        scale = self.coding.scales.get(name)
        if scale is None:
            return self.tensors[name]
        return scaled(name, self.tensors[name], scale, None if self.config is None else self.config.block_sizes)

    @property
    def parameters(self) -> list[str]:
        """Names without those of scales."""
        return [name for name in self.tensors if name not in self.coding.companions]


def read_checkpoint(source: ModelSource) -> Checkpoint:
    """A model from a mapping of tensors, a file of them, an index of such files or a model's directory.

    Raises :class:`InputError` for what is no model, or not all of one. Files are mapped, nothing is copied.
    """
    if isinstance(source, Mapping):
        wrong = next((k for k, v in source.items() if not isinstance(v, Tensor)), None)
        if wrong is not None:
            raise InputError(f"the state dict holds {wrong!r}, which is no tensor; pass `model.state_dict()`")
        return _checkpoint("the state dict", {k: v.detach() for k, v in source.items()}, None, ())
    found = locate_model(source)
    return _checkpoint(found.where, found.files.read(), found.config, found.notes)


@dataclass(frozen=True, slots=True)
class Located:
    """Where a model lies: its files, what messages call it, its configuration, and notes."""

    where: str
    files: ModelFiles
    config: ModelConfig | None
    notes: tuple[str, ...] = ()


def locate_model(source: str | os.PathLike[str]) -> Located:
    """The files of a model's directory, of an index, or one file. Raises :class:`InputError` for what is no model."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = find_model(path)
        return Located(str(path), files, read_model_config(path), _notes(files))
    if not path.exists():
        raise InputError(f"there is no file or directory {path}; pass a model's directory, or its file of tensors")
    if path.name.endswith(INDEX_SUFFIX):
        places = read_index(path)
        files = ModelFiles(path.parent, tuple(path.parent / f for f in dict.fromkeys(places.values())), places)
        return Located(str(path), files, read_model_config(path.parent))
    refuse_shard(path)
    # The configuration beside a file counts where the file has the name of a whole model.
    config = read_model_config(path.parent) if path.name in WHOLE_NAMES else None
    return Located(str(path), ModelFiles(path.parent, (path,)), config)


def _checkpoint(where: str, state: dict[str, Tensor], config: ModelConfig | None, notes: tuple[str, ...]) -> Checkpoint:
    tensors = plain_names(where, state)
    return Checkpoint(where, tensors, config, find_coding(tensors, config.quantisation if config else None), notes)


def plain_names(where: str, state: Mapping[str, V]) -> dict[str, V]:
    """Names without the segments of wrappers; ``module.`` in front of all names is one, too.

    Raises :class:`InputError` for names that differ by wrappers alone, and for those of a model with adapters in it.
    """
    plain = {name: WRAPPERS.sub("", name) for name in state}
    if plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        raise InputError(f"{where} holds tensors under two names that differ by wrappers alone; save the model again")
    adapted = next((name for name in plain.values() if PEFT_NAMES.search(name)), None)
    if adapted is not None:
        raise InputError(
            f"{where} holds {adapted!r}, a part of a model with adapters of PEFT; merge them into it first "
            "(`merge_and_unload` of peft)"
        )
    return {plain[name]: tensor for name, tensor in state.items()}


def _notes(files: ModelFiles) -> tuple[str, ...]:
    if not files.beside:
        return ()
    return (f"{files.directory}: {listed(files.beside)} beside the model's files, not read",)


def stored_as(tensor: Tensor) -> str:
    """The name of a dtype."""
    return str(tensor.dtype).removeprefix("torch.")
