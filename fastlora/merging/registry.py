"""Merge methods by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool


Merge = Callable[..., "Adapter"]

# Modules that register merge methods.
_FILES = ("cat", "pem", "svd")
_registry: dict[str, Method] = {}


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: what ``fastlora merge --method`` accepts."""

    name: str
    summary: str
    parameters: Mapping[str, str]
    source: str
    run: Merge

    def __call__(self, pool: Pool, weights: Mapping[str, float], **parameters: object) -> Adapter:
        unknown = [p for p, value in parameters.items() if value is not None and p not in self.parameters]
        if unknown:
            takes = ", ".join(self.parameters) or "no parameters"
            raise InputError(f"method {self.name!r} does not take {', '.join(unknown)}: it takes {takes}")
        return self.run(pool, weights, **{p: v for p, v in parameters.items() if v is not None})


def method(name: str, *, summary: str, parameters: Mapping[str, str], source: str) -> Callable[[Merge], Merge]:
    """Registers ``run(pool, weights, **parameters) -> Adapter`` as a merge method."""

    def register(run: Merge) -> Merge:
        _registry[name] = Method(name, summary, parameters, source, run)
        return run

    return register


def all_methods() -> dict[str, Method]:
    """Every registered merge method, in the order of names."""
    for file in _FILES:
        importlib.import_module(f"fastlora.methods.{file}")
    return dict(sorted(_registry.items()))


def find_method(name: str) -> Method:
    found = all_methods()
    if name not in found:
        raise InputError(f"method {name!r} does not exist: use one of {', '.join(found)} (`fastlora.methods()`)")
    return found[name]


class _Methods(ModuleType):
    """This module has the name of the public function ``fastlora.methods``, and hides it once it is imported: so it is
    that function too."""

    def __call__(self) -> dict[str, Method]:
        return all_methods()


sys.modules[__name__].__class__ = _Methods
