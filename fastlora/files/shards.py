"""Which files of a directory are the model: its index says it, or the names that model libraries write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from torch import Tensor

from fastlora.core.names import CONFIG_NAME
from fastlora.errors import InputError
from fastlora.files.json_files import parse_object, require_file
from fastlora.files.tensor_files import SAFETENSORS, read_safetensors
from fastlora.files.torch_files import read_torch

V = TypeVar("V")

INDEX_SUFFIX = ".index.json"
LARGEST_INDEX = 256 << 20
STEMS = (
    ("model", SAFETENSORS),
    ("diffusion_pytorch_model", SAFETENSORS),
    ("pytorch_model", ".bin"),
    ("diffusion_pytorch_model", ".bin"),
)
"""What model libraries call their files, in the order in which they look for them."""
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.safetensors|\.bin)")
LISTED = 4


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model. ``names``: which tensors of which file, where an index says so. ``beside``: other files
    of tensors in the directory, which are not read."""

    directory: Path
    files: tuple[Path, ...]
    names: Mapping[str, str] | None = None
    beside: tuple[str, ...] = ()

    def read(self) -> dict[str, Tensor]:
        """The tensors of all files, mapped; see :meth:`collect`."""
        return self.collect(read_file)

    def collect(self, read: Callable[[Path], dict[str, V]]) -> dict[str, V]:
        """What ``read`` finds in all files. Raises :class:`InputError` for files and tensors that are missing, and for
        names that several files hold."""
        state: dict[str, V] = {}
        for file in self.files:
            tensors = read(file)
            if self.names is not None:
                wanted = [name for name, place in self.names.items() if place == file.name]
                lacking = [name for name in wanted if name not in tensors]
                if lacking:
                    raise InputError(
                        f"{file} lacks {listed(lacking)}, which the index of {self.directory} says it holds; it is of "
                        "another version or incomplete: download the model again"
                    )
                tensors = {name: tensors[name] for name in wanted}
            twice = next((name for name in tensors if name in state), None)
            if twice is not None:
                raise InputError(f"{self.directory}: several files hold {twice!r}; pass the file that is meant")
            state.update(tensors)
        return state


def find_model(directory: Path) -> ModelFiles:
    """The model in a directory: what an index names; else ``model.safetensors``, or ``model-*-of-*.safetensors``; then
    the same for other usual names and for ``.bin``; else every ``.safetensors`` that is there.

    Raises :class:`InputError` for directories without a model, for shards that are missing and for indices that name
    files elsewhere.
    """
    if (directory / CONFIG_NAME).exists():
        raise InputError(
            f"{directory} is an adapter and no whole model; load it with `fl.load`, or merge it into its base model "
            "first (`merge_and_unload` of peft)"
        )
    present = sorted(p.name for p in directory.iterdir() if p.suffix in (SAFETENSORS, ".bin"))
    for stem, suffix in STEMS:
        found = _by_stem(directory, stem, suffix, present)
        if found is not None:
            return found
    files = [name for name in present if name.endswith(SAFETENSORS)]
    if files:
        for stem in dict.fromkeys(m[1] for m in map(SHARD.fullmatch, files) if m is not None):
            _by_stem(directory, stem, SAFETENSORS, files)  # under names of its own: complete all the same
        return ModelFiles(directory, tuple(directory / name for name in files))
    raise InputError(
        f"{directory} holds no model.safetensors and no pytorch_model.bin, whole or in shards; {_out(directory)}"
    )


def read_index(path: Path) -> dict[str, str]:
    """``{tensor: file}`` of an index. Raises :class:`InputError` for what is no index, or names files elsewhere."""
    require_file(path, LARGEST_INDEX)
    places = parse_object(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise InputError(f"{path} has no 'weight_map' from names of tensors to files; download the model again")
    for file in dict.fromkeys(places.values()):
        parts = PurePosixPath(file.replace("\\", "/")).parts
        if len(parts) != 1 or parts[0] in ("..", "/"):
            raise InputError(
                f"{path} names the file {file[:80]!r}, which is not in its own directory; such an index is not "
                "followed: put the files beside it and correct it"
            )
    return places


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if path.suffix == ".gguf":
        raise InputError(
            f"{path} is a GGUF file, whose weights are quantised; pass the model in the format of transformers"
        )
    return read_safetensors(path) if path.suffix == SAFETENSORS else read_torch(path)


def refuse_shard(path: Path) -> None:
    """Refuses one shard of several: the rest of the model is missing in it."""
    match = SHARD.fullmatch(path.name)
    if match is not None and int(match[3]) > 1:
        raise InputError(
            f"{path} is shard {int(match[2])} of {int(match[3])}, a part of a model; pass its directory {path.parent}"
        )


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Some names in a message."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _by_stem(directory: Path, stem: str, suffix: str, present: list[str]) -> ModelFiles | None:
    index = directory / f"{stem}{suffix}{INDEX_SUFFIX}"
    whole = f"{stem}{suffix}"
    shards = [m for m in map(SHARD.fullmatch, present) if m is not None and m[1] == stem and m[4] == suffix]
    if index.exists():
        places = read_index(index)
        files = list(dict.fromkeys(places.values()))
        missing = [name for name in files if not (directory / name).exists()]
        if missing:
            raise InputError(
                f"{directory} lacks {listed(missing)}, which {index.name} names; the model is incomplete: "
                "download it again"
            )
        return ModelFiles(directory, tuple(directory / f for f in files), places, _others(present, files))
    if whole in present:
        return ModelFiles(directory, (directory / whole,), None, _others(present, [whole]))
    if not shards:
        return None
    totals = sorted({int(m[3]) for m in shards})
    if len(totals) > 1:
        raise InputError(
            f"{directory} holds shards of models in {' and in '.join(map(str, totals))} files, and no {index.name} "
            "says which are meant; remove the others"
        )
    numbers = {int(m[2]) for m in shards}
    missing = [f"number {n}" for n in range(1, totals[0] + 1) if n not in numbers]
    if missing:
        raise InputError(
            f"{directory} lacks shard {listed(missing)} of {totals[0]} ({stem}-…-of-…{suffix}); the model is "
            "incomplete: download it again"
        )
    files = [m[0] for m in shards]
    return ModelFiles(directory, tuple(directory / f for f in files), None, _others(present, files))


def _others(present: list[str], files: list[str]) -> tuple[str, ...]:
    """Files of tensors that are not the model; pickles of a trainer are none."""
    return tuple(name for name in present if name not in files and name.endswith(SAFETENSORS))


def _out(directory: Path) -> str:
    if (directory / "model_index.json").exists():
        return f"it is a pipeline of several models: pass one of its folders, such as {directory / 'unet'}"
    return "pass a model's directory or file"
