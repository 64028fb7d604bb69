"""Merge, decompose and edit pools of low-rank adapters, exactly and without dense matrices.

Nothing heavy is imported until a name is used, so that ``fastlora --help`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastlora._version import __version__

_EXPORTS = {
    "Adapter": "fastlora.adapters.lora",
    "Comparison": "fastlora.coefficients.comparison",
    "Decomposition": "fastlora.decomposition.result",
    "DecompositionPlan": "fastlora.decomposition.plan",
    "DoRA": "fastlora.adapters.dora",
    "FastloraError": "fastlora.errors",
    "IA3": "fastlora.adapters.ia3",
    "InputDecomposition": "fastlora.decomposition.input_parts",
    "InputError": "fastlora.errors",
    "LearnedMerge": "fastlora.coefficients.learned",
    "OutputError": "fastlora.errors",
    "Pool": "fastlora.adapters.pool",
    "PoolGram": "fastlora.coefficients.pool_gram",
    "Recipe": "fastlora.merging.recipe",
    "Statistics": "fastlora.merging.input_rows",
    "Sweep": "fastlora.coefficients.sweep",
    "TaskVector": "fastlora.adapters.task_vector",
    "UnsupportedAdapter": "fastlora.errors",
    "add": "fastlora.merging.arithmetic",
    "analogy": "fastlora.merging.arithmetic",
    "apply": "fastlora.checkpoints.apply",
    "check": "fastlora.dialects.check",
    "choose": "fastlora.coefficients.choose",
    "compose": "fastlora.expressions.compose",
    "compress": "fastlora.merging.compress",
    "control": "fastlora.coefficients.control",
    "convert": "fastlora.adapters.convert",
    "decompose": "fastlora.decomposition.decompose",
    "distributed": "fastlora.runtime.distributed",
    "extract": "fastlora.adapters.extract",
    "load": "fastlora.adapters.loading",
    "merge": "fastlora.merging.merge",
    "methods": "fastlora.merging.merge",
    "modulate": "fastlora.dipm.parts",
    "negate": "fastlora.merging.arithmetic",
    "overlap": "fastlora.analysis.overlap",
    "recombine": "fastlora.merging.recombine",
    "report": "fastlora.pages.report",
    "statistics": "fastlora.merging.statistics",
    "sweep": "fastlora.coefficients.sweep",
    "task_vector": "fastlora.adapters.task_vector",
    "to_lora": "fastlora.adapters.to_lora",
    "use_backend": "fastlora.ops.dispatch",
    "weights": "fastlora.coefficients.weights",
}

_MODULES = {"dipm": "fastlora.dipm", "ops": "fastlora.ops"}

__all__ = ["__version__", *_MODULES, *_EXPORTS]

if TYPE_CHECKING:
    from fastlora import dipm as dipm
    from fastlora import ops as ops
    from fastlora.adapters.convert import convert as convert
    from fastlora.adapters.dora import DoRA as DoRA
    from fastlora.adapters.extract import extract as extract
    from fastlora.adapters.ia3 import IA3 as IA3
    from fastlora.adapters.loading import load as load
    from fastlora.adapters.lora import Adapter as Adapter
    from fastlora.adapters.pool import Pool as Pool
    from fastlora.adapters.task_vector import TaskVector as TaskVector
    from fastlora.adapters.task_vector import task_vector as task_vector
    from fastlora.adapters.to_lora import to_lora as to_lora
    from fastlora.analysis.overlap import overlap as overlap
    from fastlora.checkpoints.apply import apply as apply
    from fastlora.coefficients.choose import choose as choose
    from fastlora.coefficients.comparison import Comparison as Comparison
    from fastlora.coefficients.control import control as control
    from fastlora.coefficients.learned import LearnedMerge as LearnedMerge
    from fastlora.coefficients.pool_gram import PoolGram as PoolGram
    from fastlora.coefficients.sweep import Sweep as Sweep
    from fastlora.coefficients.sweep import sweep as sweep
    from fastlora.coefficients.weights import weights as weights
    from fastlora.decomposition.decompose import decompose as decompose
    from fastlora.decomposition.input_parts import InputDecomposition as InputDecomposition
    from fastlora.decomposition.plan import DecompositionPlan as DecompositionPlan
    from fastlora.decomposition.result import Decomposition as Decomposition
    from fastlora.dialects.check import check as check
    from fastlora.dipm.parts import modulate as modulate
    from fastlora.errors import FastloraError as FastloraError
    from fastlora.errors import InputError as InputError
    from fastlora.errors import OutputError as OutputError
    from fastlora.errors import UnsupportedAdapter as UnsupportedAdapter
    from fastlora.expressions.compose import compose as compose
    from fastlora.merging.arithmetic import add as add
    from fastlora.merging.arithmetic import analogy as analogy
    from fastlora.merging.arithmetic import negate as negate
    from fastlora.merging.compress import compress as compress
    from fastlora.merging.input_rows import Statistics as Statistics
    from fastlora.merging.merge import merge as merge
    from fastlora.merging.merge import methods as methods
    from fastlora.merging.recipe import Recipe as Recipe
    from fastlora.merging.recombine import recombine as recombine
    from fastlora.merging.statistics import statistics as statistics
    from fastlora.ops.dispatch import use_backend as use_backend
    from fastlora.pages.report import report as report
    from fastlora.runtime.distributed import distributed as distributed


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
