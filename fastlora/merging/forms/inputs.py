"""Methods on factors that also use the inputs of the modules: rows of ``x`` for every adapter, unlabelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.engine import shares
from fastlora.engine.checks import require_finite
from fastlora.errors import InputError
from fastlora.merging.forms.result import merged_adapter
from fastlora.merging.input_rows import Statistics
from fastlora.merging.registry import Idle, driven, none_idle
from fastlora.runtime.progress import track

Program = TypeVar("Program", bound=Callable[..., Update])


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """One adapter in one module: ``w_i``, its update, and its rows ``X_i [N_i, m]`` as they are stored."""

    weight: float
    update: Update
    rows: Tensor

    def scaled_rows(self) -> Tensor:
        """``X_i / √N_i`` in float64: ``C_i`` is the product of their transpose with them."""
        return self.rows.double() / math.sqrt(max(len(self.rows), 1))

    def right(self) -> Tensor:
        """``A_i [r_i, m]`` in float64."""
        return dense(self.update.A)


def dense(factor: Factor) -> Tensor:
    """A factor of the ``A`` side as one float64 matrix ``[rank, m]``."""
    total = torch.zeros(factor.rank, factor.length, dtype=torch.float64)
    for source, coefficient in factor.coefficients():
        total += (coefficient.mT @ source.double()).cpu()
    return total


def method(*, summary: str, source: str, idle: Idle = none_idle, **facts: str) -> Callable[[Program], Program]:
    """Registers ``program(inputs, *, …)``, which :func:`merge` runs."""
    return driven(
        "factors", merge, summary, source, idle=idle, **{"needs": "inputs of modules", "cost": "inputs", **facts}
    )


def merge(
    program: Callable[..., Update], pool: Pool, weights: Mapping[str, float], data: Statistics, **parameters: object
) -> Adapter:
    """The merge whose update, in every module, is ``program`` of the adapters that have it and of what they saw.

    Args:
        program: takes a sequence of :class:`Input`, one of each adapter that has the module, and returns an update of
            the shape and layout of theirs.
        pool: the adapters.
        weights: of every adapter, by name.
        data: of every adapter, by name.

    Raises:
        InputError: a module without rows, or with rows of another length.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: one read of the factors and of the rows, beside what the program does.
    """
    require_finite(pool.adapters)
    name = program.__name__
    label = f"merging by {name}"

    def work() -> dict[str, Update]:
        mine = shares.own_of_pool(pool)
        return {m: program(_inputs(pool, m, weights, data), **parameters) for m in track(mine, label)}

    updates = shares.each(label, work, pool.adapters)
    return merged_adapter(name, pool, [weights[n] for n in pool.names], updates, parameters)


def _inputs(pool: Pool, module: str, weights: Mapping[str, float], data: Statistics) -> Sequence[Input]:
    found = []
    for i in pool.present(module):
        adapter = pool.adapters[i]
        update, rows = adapter.updates[module], data.of[adapter.name].of(module)
        if update.layout.kind not in ("linear", "conv"):
            raise InputError(
                f"module {module!r} is no linear module and no convolution ({update.layout.kind}), so it has no inputs "
                "of this kind; merge it by another method"
            )
        if rows is None:
            raise InputError(
                f"the statistics of {adapter.name!r} lack module {module!r}; collect them for all of `pool.modules`"
            )
        if rows.shape[1] != update.shape[1]:
            raise InputError(
                f"the statistics of {adapter.name!r} have inputs of length {rows.shape[1]} for {module!r}, whose "
                f"weight is {list(update.shape)}; they are of another model"
            )
        found.append(Input(weights[adapter.name], update, rows))
    return found
