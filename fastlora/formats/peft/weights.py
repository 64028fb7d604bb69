"""The tensors of a PEFT directory: in one file, the older ``.bin``, or several files with an index.

PEFT itself writes one file. Transformers' ``save_pretrained`` splits a large adapter as it does a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fastlora.core.names import CONFIG_NAME
from fastlora.errors import InputError
from fastlora.files.json_files import parse_object, require_file
from fastlora.files.tensor_files import read_safetensors
from fastlora.files.torch_files import read_torch
from fastlora.formats.peft.names import OLD_WEIGHTS_NAME, WEIGHTS_NAME

SHARD = re.compile(r"adapter_model-(\d{5,6})-of-(\d{5,6})\.(safetensors|bin)")
LARGEST_INDEX = 64 << 20


def read_tensors(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of tensors in a PEFT directory, or the index of several, and what is stored."""
    for name, read in ((WEIGHTS_NAME, read_safetensors), (OLD_WEIGHTS_NAME, _read_bin)):
        path = directory / name
        if os.path.lexists(path):
            return path, read(path)
        index = path.with_name(f"{path.name}.index.json")
        if os.path.lexists(index):
            return index, _read_indexed(index, read)
        shards = [p for p in _entries(directory) if SHARD.fullmatch(p.name) and p.suffix == path.suffix]
        if shards:
            return shards[0], _read_numbered(shards, read)
    found = ", ".join(p.name for p in _entries(directory)[:8])
    raise InputError(
        f"{directory} has {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME} (found: {found}); "
        "copy or download the weights beside it"
    )


Read = Callable[[Path], dict[str, Tensor]]


def _read_bin(file: Path) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in read_torch(file).items()}


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def _read_indexed(index: Path, read: Read) -> dict[str, Tensor]:
    """What the index names, each tensor from its file, and nothing else."""
    require_file(index, LARGEST_INDEX)
    places = parse_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: field 'weight_map' is no object {{tensor: file}}; copy or download it again")
    wrong = next((name for name in places.values() if not SHARD.fullmatch(name)), None)
    if wrong is not None:
        raise InputError(f"{index} names the file {wrong[:80]!r}, which is no adapter_model-…-of-….safetensors")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).exists():
            raise InputError(f"{index} names {name}, which is not beside it; copy or download the adapter again")
        _add(tensors, read(index.parent / name), index.parent / name)
    apart = [key for key in (*places, *tensors) if (key in places) != (key in tensors)]
    if apart:
        raise InputError(
            f"{index} and the files beside it do not belong together: only one of them has {apart[0]!r}; copy or "
            "download the adapter again"
        )
    return tensors


def _read_numbered(shards: list[Path], read: Read) -> dict[str, Tensor]:
    """The tensors of ``…-00001-of-00002`` and so on, all of which must be there, where the index was lost."""
    numbers = [SHARD.fullmatch(p.name) for p in shards]
    counts = {int(m[2]) for m in numbers if m}
    if counts != {len(shards)} or sorted(int(m[1]) for m in numbers if m) != list(range(1, len(shards) + 1)):
        raise InputError(
            f"{shards[0].parent} holds {', '.join(p.name for p in shards[:4])}, which is not every part of an adapter; "
            "copy or download the others beside them"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        _add(tensors, read(shard), shard)
    return tensors


def _add(tensors: dict[str, Tensor], more: dict[str, Tensor], file: Path) -> None:
    twice = next((key for key in more if key in tensors), None)
    if twice is not None:
        raise InputError(f"{file} holds {twice!r}, which another part of the adapter has too; remove one")
    tensors.update(more)
