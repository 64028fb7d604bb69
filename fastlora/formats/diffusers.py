"""Files of diffusers: ``unet.``, ``transformer.``, ``text_encoder.`` or nothing before a module's name."""

from __future__ import annotations

from pathlib import Path

from fastlora.dialects.file_format import SINGLE_FILES, SUFFIX, WRITES, read, ready, sink
from fastlora.dialects.looks import is_of

__all__ = ["SINGLE_FILES", "SUFFIX", "WRITES", "detects", "read", "ready", "sink"]


def detects(path: Path) -> bool:
    """Whether a path is such a file, or a folder that stands for one."""
    return is_of("diffusers", path)
