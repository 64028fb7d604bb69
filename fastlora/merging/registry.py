"""Merge methods by name: what ``method=`` and ``--method`` accept. One file of ``merging/methods/`` a method."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.errors import InputError

Merge = Callable[..., Adapter]

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


@functools.cache
def _loaded() -> None:
    methods = importlib.import_module("fastlora.merging.methods")
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


def all_methods() -> dict[str, Method]:
    """Every registered merge method, in the order of names."""
    _loaded()
    return dict(sorted(_registry.items()))


def find_method(name: str) -> Method:
    known = all_methods()
    if name not in known:
        raise InputError(f"method {name!r} does not exist: use one of {', '.join(known)} (`fastlora.methods()`)")
    return known[name]
