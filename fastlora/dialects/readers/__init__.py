"""What programs make of single files, as rules of our own, each tried on the program or read in its code. One module a
program, found by listing this folder.

A rule knows names, shapes, alphas and metadata of a file (:mod:`fastlora.dialects.file_facts`); it looks at no factor.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Protocol, cast

from fastlora.dialects.file_facts import FileFacts
from fastlora.dialects.verdicts import Reading


class Reader(Protocol):
    """A module of this folder."""

    TITLE: str
    """What the program is called."""
    VERSION: str
    """What the rules hold for."""
    BASIS: str
    """Where the rules are from: the program was run, or read."""
    BY_DEFAULT: bool
    """Whether it counts where no reader is named."""

    def read(self, file: FileFacts) -> Reading:
        """What the program makes of a file."""


@functools.cache
def all_readers() -> dict[str, Reader]:
    """Every reader by its name, that of its module with dashes; diffusers and ComfyUI first."""
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=_rank)
    return {name.replace("_", "-"): cast(Reader, importlib.import_module(f"{__name__}.{name}")) for name in names}


def _rank(name: str) -> tuple[int, str]:
    first = ("diffusers", "comfy", "sd_scripts", "a1111")
    return (first.index(name) if name in first else len(first), name)
