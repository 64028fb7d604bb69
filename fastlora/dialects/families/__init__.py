"""Families of image and video models, one file each, found by listing this folder. A file has ``FAMILIES``."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fastlora.dialects.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """All families by name."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [f for name in files for f in importlib.import_module(f"{__name__}.{name}").FAMILIES]
    return {family.name: family for family in found}


def family_named(name: str) -> Family | None:
    """The family that has this name or alias."""
    known = families()
    return known.get(name) or next((f for f in known.values() if name in f.aliases), None)
