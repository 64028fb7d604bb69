"""The import of torch without what only its compilers need."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

PARENT, NAME = "torch", "_meta_registrations"
RULES = f"{PARENT}.{NAME}"
"""Torch's rules for the shapes of results, in Python. Compilers and fake tensors ask them; results on a processor or a
device come from kernels that do not."""


class _Later(ModuleType):
    """Stands for a module that is not imported yet, until somebody asks for what is in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        _forget(self)
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def lean_torch() -> Iterator[None]:
    """Inside the block, the first import of torch leaves out :data:`RULES`, a quarter of it. For a process of its own
    that computes on a CPU and imports no other package that builds on torch: its compilers, and so peft and
    transformers, can be imported afterwards only if the rules are, by name, before them."""
    if PARENT in sys.modules:
        yield
        return
    later = _Later(RULES)
    sys.modules[RULES] = later
    try:
        yield
    finally:
        _forget(later)


def _forget(later: ModuleType) -> None:
    if sys.modules.get(later.__name__) is later:
        del sys.modules[later.__name__]
    parent = sys.modules.get(PARENT)
    if parent is not None and parent.__dict__.get(NAME) is later:
        delattr(parent, NAME)
