"""What a single file looks like: which format it is of, from the names of its tensors alone."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastlora.core.names import CONFIG_NAME
from fastlora.dialects.detect import identify
from fastlora.dialects.prefixes import split_prefix
from fastlora.dialects.suffixes import sorted_names
from fastlora.dialects.weights import is_factor, weight_shape
from fastlora.errors import FastloraError
from fastlora.files.earlier import MARK
from fastlora.files.tensor_files import SAFETENSORS, read_header, read_safetensors
from fastlora.files.torch_files import read_torch

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (SAFETENSORS, *TORCH_SUFFIXES)
CALLED = ("pytorch_lora_weights",)
"""What diffusers calls the file of an adapter in a folder, without its suffix."""
OF_PEFT, OF_MLX = "adapter_model", "adapters"
"""What files are called that need the configuration beside them."""
FLAT, ORIGINAL = ("lora_", "lycoris_"), ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
COMPONENTS = ("unet.", "transformer.", "transformer_2.", "text_encoder")
"""What names begin with in the files of kohya's scripts, of ComfyUI and of diffusers."""
MOST_FILES = 8
"""Of a folder that are looked into."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Looks:
    """``format``: the module of :mod:`fastlora.formats` that reads the file. ``prefix``: what most names begin with."""

    format: str
    prefix: str


def looks_of(path: Path) -> Looks | None:
    """What a file looks like; ``None`` for what is no single file of an adapter, or cannot be read."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    if path.stem.startswith(OF_PEFT) or (path.stem == OF_MLX and (path.parent / CONFIG_NAME).exists()):
        return None
    try:
        status = path.stat()
        return _looks(path, status.st_mtime_ns, status.st_size, status.st_ino)
    except (OSError, FastloraError):  # whoever reads the file tells it better
        return None


def file_in(folder: Path) -> Path | None:
    """The single file that a folder stands for: the one that diffusers would take, or the only one that looks like an
    adapter. ``None`` for a folder that is something else, and for several."""
    if os.path.lexists(folder / CONFIG_NAME):  # as most are, of which the entries need not be listed
        return None
    try:
        names = {entry.name: entry for entry in folder.iterdir()}
    except OSError:
        return None
    if {CONFIG_NAME, "config.json", "model_index.json"} & names.keys():
        return None
    called = [names[stem + suffix] for stem in CALLED for suffix in SUFFIXES if stem + suffix in names]
    if called:
        return called[0] if looks_of(called[0]) is not None else None
    for suffixes in ((SAFETENSORS,), TORCH_SUFFIXES):
        files = [e for e in names.values() if e.suffix in suffixes and e.is_file()]
        found = [e for e in files if looks_of(e) is not None] if len(files) <= MOST_FILES else files
        if found:
            return found[0] if len(found) == 1 else None
    return None


def is_of(format: str, path: Path) -> bool:
    """Whether a path is a single file of a format, or a folder that stands for one."""
    file = file_in(path) if path.is_dir() else path
    looks = None if file is None else looks_of(file)
    return looks is not None and looks.format == format


def open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, those of ``.safetensors`` as views of the mapped file, and what its header says."""
    if path.suffix == SAFETENSORS:
        return read_safetensors(path), read_header(path).metadata
    return {key: tensor.contiguous() for key, tensor in read_torch(path).items()}, {}


@functools.lru_cache(maxsize=256)
def _looks(path: Path, modified: int, size: int, inode: int) -> Looks | None:
    shapes, metadata = _names(path)
    return None if '"kind"' in metadata.get(MARK, "") else look(shapes)


def _names(path: Path) -> tuple[Mapping[str, Shape], Mapping[str, str]]:
    if path.suffix == SAFETENSORS:
        header = read_header(path)
        return header.shapes, header.metadata
    return {key: tuple(tensor.shape) for key, tensor in read_torch(path).items()}, {}


def look(shapes: Mapping[str, Shape]) -> Looks | None:
    """What tensors of these names and shapes look like."""
    names = sorted_names(tuple(shapes))
    parts_by_stem = {stem: dict(parts) for stem, _, parts in names.modules if any(map(is_factor, dict(parts)))}
    stems = list(parts_by_stem) or ([names.refused[0]] if names.refused is not None else [])
    if not stems:
        return None
    if "xlabs" in names.spellings:
        return Looks("xlabs", "")
    prefix = Counter(split_prefix(stem).prefix for stem in stems).most_common(1)[0][0]
    if prefix.startswith(FLAT):
        return Looks("kohya", prefix)
    if prefix.startswith(ORIGINAL):
        return Looks("comfy", prefix)
    if prefix.startswith(COMPONENTS) or "processor" in names.spellings:
        return Looks("diffusers", prefix)
    # Without a prefix, or with that of PEFT, a file is one of image models only if its names say so.
    sizes = {
        stem: weight_shape({part: shapes[key] for part, key in parts.items()}) or (0, 0)
        for stem, parts in parts_by_stem.items()
    }
    found = identify(sizes) if sizes else None
    known = found is not None and (found.family is not None or bool(found.candidates))
    return Looks("diffusers", prefix) if known else None
