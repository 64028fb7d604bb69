"""A model as a stream: where every tensor of it lies, from the headers of its files alone.

Whole checkpoints are larger than memory, so nothing here holds a tensor. :func:`read_stored_model` makes the plan:
tensor → (file, offset, dtype, shape), for a folder, shards with or without an index, and one file.
:class:`fastlora.files.tile_reads.TileReads` reads rows of what the plan names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.files.checkpoint import ModelSource, locate_model, plain_names
from fastlora.files.model_config import ModelConfig
from fastlora.files.quantised import FLOAT8, Coding, find_coding
from fastlora.files.shards import read_file
from fastlora.files.tensor_files import DTYPE_NAMES, SAFETENSORS, StoredTensor, read_places, read_safetensors


@dataclass(frozen=True, slots=True, eq=False)
class StoredModel:
    """The plan of a model's files.

    where: what messages call it.
    tensors: by name, without the segments of wrappers (``StoredTensor.name`` has them); in the order of the files.
    directory: the folder that the files lie in, ``None`` for a state dict.
    files: the files of tensors. ``names``: which tensors of which file, where an index says so.
    config: ``config.json``; ``None`` where there is none.
    coding: how tensors are stored; :meth:`Coding.refusal` tells of codes.
    notes: what was left out while it was read.
    """

    where: str
    tensors: Mapping[str, StoredTensor]
    directory: Path | None = None
    files: tuple[Path, ...] = ()
    names: Mapping[str, str] | None = None
    config: ModelConfig | None = None
    coding: Coding = field(default_factory=Coding)
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> list[str]:
        """Names without those of scales."""
        return [name for name in self.tensors if name not in self.coding.companions]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def outlines(self) -> dict[str, Tensor]:
        """Tensors on the meta device, of the shapes and dtypes that are stored: for what looks at shapes alone."""
        return {name: outline(tensor) for name, tensor in self.tensors.items()}


def read_stored_model(source: ModelSource) -> StoredModel:
    """The plan of a model: of a directory, an index, one file, or a mapping of tensors.

    Only headers are read (``.bin`` files are mapped). Raises :class:`InputError` for what is no model or not all of
    one: a shard that is missing or cut off, an index that names tensors or files that are not there, tensors in two
    files.
    """
    if isinstance(source, Mapping):
        wrong = next((k for k, v in source.items() if not isinstance(v, Tensor)), None)
        if wrong is not None:
            raise InputError(f"the state dict holds {wrong!r}, which is no tensor; pass `model.state_dict()`")
        stored = {name: _viewed(name, None, tensor.detach()) for name, tensor in source.items()}
        tensors = plain_names("the state dict", stored)
        return StoredModel("the state dict", tensors, coding=find_coding(_looked_at(tensors), None))
    found = locate_model(source)
    tensors = plain_names(found.where, found.files.collect(_places_of))
    return StoredModel(
        found.where,
        tensors,
        found.files.directory,
        found.files.files,
        found.files.names,
        found.config,
        find_coding(_looked_at(tensors), found.config.quantisation if found.config else None),
        found.notes,
    )


def outline(tensor: StoredTensor) -> Tensor:
    """A tensor on the meta device; of a dtype that torch does not have, as bytes."""
    return torch.empty(tensor.shape, dtype=tensor.dtype or torch.uint8, device="meta")


def _places_of(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == SAFETENSORS:
        return read_places(path)
    return {name: _viewed(name, path, tensor) for name, tensor in read_file(path).items()}


def _viewed(name: str, path: Path | None, tensor: Tensor) -> StoredTensor:
    code = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return StoredTensor(name, path, 0, tensor.nbytes, tuple(tensor.shape), code, tensor.dtype, tensor)


def _looked_at(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """What tells how tensors are coded: outlines, and the values of those in float8, mapped."""
    files = {t.file for t in tensors.values() if t.dtype in FLOAT8 and t.view is None and t.file is not None}
    mapped = {file: read_safetensors(file) for file in files}
    found = {}
    for name, tensor in tensors.items():
        if tensor.view is not None:
            found[name] = tensor.view
        elif tensor.file in mapped:
            found[name] = mapped[tensor.file][tensor.name]
        else:
            found[name] = outline(tensor)
    return found
