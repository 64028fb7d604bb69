"""The form of methods that are functions of the factors themselves, and so may depend on how ``ΔW`` is factored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.sums import sum_updates
from fastlora.core.updates import Update
from fastlora.engine.checks import require_finite
from fastlora.merging.forms.result import merged_adapter
from fastlora.merging.registry import Idle, driven, none_idle
from fastlora.runtime.progress import track

Program = TypeVar("Program", bound=Callable[..., Update])


def method(*, summary: str, source: str, idle: Idle = none_idle, **facts: str) -> Callable[[Program], Program]:
    """Registers ``program(terms, *, …)``, which :func:`merge` runs."""
    return driven("factors", merge, summary, source, idle=idle, **facts)


def merge(program: Callable[..., Update], pool: Pool, weights: Mapping[str, float], **parameters: object) -> Adapter:
    """The merge whose update, in every module, is ``program`` of the updates of the adapters that have it.

    Args:
        program: takes ``[(w_i, update_i), …]`` of one module, one pair at the least and all of one shape and layout,
            and returns an update of that shape and layout. It should be lazy: terms on the stored matrices, small
            coefficients, nothing computed that is as long as a factor.
        pool: the adapters.
        weights: of every adapter, by name.

    Raises:
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: one read of the factors, beside what the program does; the result is read from them when it is used.
    """
    require_finite(pool.adapters)  # no Gram pass here would find NaN
    adapters, name = pool.adapters, program.__name__
    updates: dict[str, Update] = {}
    for module in track(pool.modules, f"merging by {name}"):
        terms = [(weights[adapters[i].name], adapters[i].updates[module]) for i in pool.present(module)]
        update = program(terms, **parameters)
        if update.shape != terms[0][1].shape or update.layout != terms[0][1].layout:
            raise TypeError(f"method {name!r}: for {module} it returns an update of another shape or layout")
        updates[module] = update
    return merged_adapter(name, pool, [weights[n] for n in pool.names], updates, parameters)


def total(name: str, pool: Pool, weights: Mapping[str, float], parameters: Mapping[str, object]) -> Adapter:
    """``Σ_i w_i ΔW_i`` and the same sum of what stands beside the updates, as the result of the method ``name``."""
    require_finite(pool.adapters)
    adapters = pool.adapters
    updates = {
        m: sum_updates([(weights[adapters[i].name], adapters[i].updates[m]) for i in pool.present(m)])
        for m in pool.modules
    }
    return merged_adapter(name, pool, [weights[n] for n in pool.names], updates, parameters)
