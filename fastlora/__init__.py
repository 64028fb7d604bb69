"""Merge, decompose and edit pools of low-rank adapters, exactly and without dense matrices.

Nothing heavy is imported until a name is used, so that ``fastlora --help`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "Adapter": "fastlora.adapter",
    "Decomposition": "fastlora.decomposition",
    "DecompositionPlan": "fastlora.plan",
    "FastloraError": "fastlora.errors",
    "IA3": "fastlora.ia3",
    "InputError": "fastlora.errors",
    "LearnedMerge": "fastlora.learned",
    "OutputError": "fastlora.errors",
    "Pool": "fastlora.pool",
    "PoolGram": "fastlora.poolgram",
    "Sweep": "fastlora.sweeps",
    "TaskVector": "fastlora.finetune",
    "UnsupportedAdapter": "fastlora.errors",
    "add": "fastlora.methods.pem",
    "analogy": "fastlora.methods.pem",
    "compose": "fastlora.composition",
    "compress": "fastlora.api",
    "control": "fastlora.methods.control",
    "decompose": "fastlora.api",
    "load": "fastlora.api",
    "merge": "fastlora.api",
    "methods": "fastlora.api",
    "modulate": "fastlora.methods.dipm",
    "negate": "fastlora.methods.pem",
    "overlap": "fastlora.api",
    "sweep": "fastlora.sweeps",
    "task_vector": "fastlora.finetune",
    "use_backend": "fastlora.backends",
    "weights": "fastlora.methods.weights",
}

_MODULES = {"dipm": "fastlora.methods.dipm", "ops": "fastlora.ops"}

__all__ = ["__version__", *_MODULES, *_EXPORTS]

if TYPE_CHECKING:
    from fastlora import ops as ops
    from fastlora.adapter import Adapter as Adapter
    from fastlora.api import compress as compress
    from fastlora.api import decompose as decompose
    from fastlora.api import load as load
    from fastlora.api import merge as merge
    from fastlora.api import methods as methods
    from fastlora.api import overlap as overlap
    from fastlora.backends import use_backend as use_backend
    from fastlora.composition import compose as compose
    from fastlora.decomposition import Decomposition as Decomposition
    from fastlora.errors import FastloraError as FastloraError
    from fastlora.errors import InputError as InputError
    from fastlora.errors import OutputError as OutputError
    from fastlora.errors import UnsupportedAdapter as UnsupportedAdapter
    from fastlora.finetune import TaskVector as TaskVector
    from fastlora.finetune import task_vector as task_vector
    from fastlora.ia3 import IA3 as IA3
    from fastlora.learned import LearnedMerge as LearnedMerge
    from fastlora.methods import dipm as dipm
    from fastlora.methods.control import control as control
    from fastlora.methods.dipm import modulate as modulate
    from fastlora.methods.pem import add as add
    from fastlora.methods.pem import analogy as analogy
    from fastlora.methods.pem import negate as negate
    from fastlora.methods.weights import weights as weights
    from fastlora.plan import DecompositionPlan as DecompositionPlan
    from fastlora.pool import Pool as Pool
    from fastlora.poolgram import PoolGram as PoolGram
    from fastlora.sweeps import Sweep as Sweep
    from fastlora.sweeps import sweep as sweep


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
