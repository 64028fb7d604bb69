"""The names of the merge methods, found without importing one: ``fastlora --help`` shows them at once."""

from __future__ import annotations

import importlib
import pkgutil

METHODS = "fastlora.merging.methods"
"""The package whose files are the methods."""


def method_files() -> list[str]:
    """The names of the methods' files, in order."""
    package = importlib.import_module(METHODS)
    return sorted(file.name for file in pkgutil.iter_modules(package.__path__))
