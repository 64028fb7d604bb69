"""Files of diffusers: ``unet.``, ``transformer.``, ``text_encoder.`` or nothing before a module's name."""

from __future__ import annotations

from pathlib import Path

from fastlora.core.data import AdapterData, DoraData, LoraData
from fastlora.dialects.looks import is_of
from fastlora.dialects.single_file import read_file

SINGLE_FILES = True
WRITES: tuple[type[AdapterData], ...] = ()


def detects(path: Path) -> bool:
    """Whether a path is such a file, or a folder that stands for one."""
    return is_of("diffusers", path)


def read(path: Path, name: str, *, family: str | None = None, rank: int | None = None) -> LoraData | DoraData:
    """The adapter in such a file; see :func:`fastlora.dialects.single_file.read_file`."""
    return read_file(path, name, family=family, rank=rank)
