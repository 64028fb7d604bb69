"""The code of methods' owners, called beside ours: packages of tests/owners.txt, and PEFT.

fusion-bench imports a training framework with everything; its formulas stand in files that need torch alone. Such a
file is run by itself, with stand-ins for what it imports of its package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.ops.merge_tiles import key_of
from fastlora.reference.philox import words

REASON = "is not installed: pip install --no-deps -r tests/owners.txt"


def module(name: str) -> Any:
    """A module of an owner; the test is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} {REASON}")


def file(package: str, path: str) -> Any:
    """One file of an installed package, run without the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} {REASON}")
    place = Path(spec.submodule_search_locations[0]) / path
    name = ".".join([package, *Path(path).with_suffix("").parts])
    own = importlib.util.spec_from_file_location(name, place)
    assert own is not None and own.loader is not None
    made = importlib.util.module_from_spec(own)
    with _stand_ins(package):
        own.loader.exec_module(made)
    return made


class _StandIn(ModuleType):
    """A module of which every class is empty, and every function does nothing, also as a decorator or a context."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else contextlib.nullcontext


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] == self.package else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stand_ins(package: str) -> Iterator[None]:
    def known() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == package]

    before = {name: sys.modules.pop(name) for name in known()}
    finder = _StandIns(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in known():
            del sys.modules[name]
        sys.modules.update(before)


def drawn(names: Sequence[str], module_name: str, seed: int) -> Callable[..., Tensor]:
    """Our masks in the place of ``torch.bernoulli(probabilities [n, m])``, one adapter after the other: torch's random
    numbers cannot be matched."""
    of = iter(names)

    def bernoulli(probabilities: Tensor, *args: object, **kwargs: object) -> Tensor:
        n, m = probabilities.shape
        numbers = np.arange(n * m, dtype=np.int64).reshape(n, m)
        word = words(numbers, key_of(seed, next(of)), key_of(module_name)).astype(np.int64)
        return (torch.from_numpy(word) < (probabilities.double() * 2**32).floor()).to(probabilities.dtype)

    return bernoulli
