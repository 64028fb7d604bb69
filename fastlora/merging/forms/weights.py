"""The form of methods that are functions of inner products ``⟨ΔW_i, ΔW_j⟩``: they find weights, module by module.

The result is the sum with these weights, exactly, in factors. Every method on vectors that forms only combinations of
them (interpolations on a sphere, means) is of this form, with ``ΔW_i`` as the vectors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import Extra
from fastlora.core.sums import combine_extras, sum_updates
from fastlora.core.updates import Update
from fastlora.engine import shares
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.inner_products import of_pool, summed
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms.result import check_result, merged_adapter
from fastlora.merging.registry import Idle, driven, none_idle

Program = TypeVar("Program", bound=Callable[..., Tensor])

CoefficientsByModule = Mapping[str, Sequence[float]]
"""``{module: one number for each adapter of the pool}``."""


def method(
    *,
    summary: str,
    source: str,
    over: Literal["module", "pool"] = "module",
    idle: Idle = none_idle,
    **facts: str,
) -> Callable[[Program], Program]:
    """Registers ``program(inner, *, …)`` or ``program(inner, weights, *, …)``, which :func:`merge` runs.

    ``over="pool"``: inner products are summed over all modules, which get the same weights (:func:`merge_alike`).
    """
    return driven("weights", merge if over == "module" else merge_alike, summary, source, idle=idle, **facts)


def merge(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: object,
) -> Adapter:
    """The sum ``Σ_i c_i w_i ΔW_i`` with ``c = program(inner products of the w_i ΔW_i)`` in every module.

    Args:
        program: takes float64 ``inner [g, k, k]`` of ``g`` modules and the ``k`` adapters of the pool, and returns
            ``c [g, k]``. An adapter that lacks a module is zero there, and so is its ``inner``. A program that takes
            ``weights`` too gets the inner products of the ``ΔW_i`` themselves and float64 ``weights [k]``, and returns
            what stands in place of the ``c_i w_i``.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank to cut the sum to; by default it is exact, of rank Σrᵢ
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank

    Raises:
        InputError: both cuts or one out of range; inner products or weights that overflow; extras that belong to no
            module.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: two passes over the factors, MATH (13); with a cut, two more and ``O(R³)`` operations a module. What a module
    adds to its output (``lora_bias``) takes the weights of the module.
    """
    if rank is not None or energy is not None:
        check_cut(rank, energy)
    finder = _Finder(program, [weights[n] for n in pool.names], parameters)

    def found() -> dict[str, list[float]]:
        own: dict[str, list[float]] = {}
        for blocks in read_pair_blocks(pool, f"inner products for {finder.name}", shared=True):
            numbers = finder.coefficients(of_pool(blocks, len(pool)), blocks.modules)
            own |= dict(zip(blocks.modules, numbers.tolist(), strict=True))
        return own

    coefficients = shares.each(f"merging by {finder.name}", found, pool.adapters)
    updates = {m: _summed(pool, m, coefficients[m]) for m in pool.modules}

    def of_equal(owns: Tensor) -> Tensor:
        """Coefficients ``[k]`` for one update that some adapters have alike, ``owns [k]``: of length one."""
        return finder.of((owns * owns[:, None])[None])[0]

    extras = _extras(pool, coefficients, of_equal)
    merged = merged_adapter(finder.name, pool, finder.weights.tolist(), updates, parameters, extras=extras)
    return merged if rank is None and energy is None else merged.compress(rank, energy=energy)


def merge_alike(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: object,
) -> Adapter:
    """The sum ``Σ_i c_i w_i ΔW_i`` with one ``c`` for all modules, of inner products summed over all of them.

    Args:
        program: as that of :func:`merge`, called once with ``g = 1``.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank to cut the sum to; by default it is exact, of rank Σrᵢ
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank

    Raises: as :func:`merge`, except for extras, which take the same weights. ``provenance["coefficients"]`` has the
    ``c_i w_i``.
    """
    if rank is not None or energy is not None:
        check_cut(rank, energy)
    finder = _Finder(program, [weights[n] for n in pool.names], parameters)
    inner = summed(pool, f"inner products for {finder.name}")
    found = finder.coefficients(inner[None], ["all modules"])[0].tolist()
    extras = combine_extras(list(zip(found, pool.adapters, strict=True)))
    updates = {m: _summed(pool, m, found) for m in pool.modules}
    merged = merged_adapter(finder.name, pool, finder.weights.tolist(), updates, parameters, extras=extras)
    told = {**merged.provenance, "coefficients": dict(zip(pool.names, found, strict=True))}
    merged = replace(merged, provenance=told)
    return merged if rank is None and energy is None else merged.compress(rank, energy=energy)


class _Finder:
    """A program with its parameters and the weights ``[k]`` of a pool."""

    def __init__(self, program: Callable[..., Tensor], weights: Sequence[float], parameters: Mapping[str, object]):
        self.program, self.parameters, self.name = program, parameters, program.__name__
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.knows_weights = "weights" in inspect.signature(program).parameters

    def of(self, inner: Tensor) -> Tensor:
        """What the ``ΔW_i`` are multiplied by, given their inner products ``[g, k, k]``: ``[g, k]``."""
        if self.knows_weights:
            return self.program(inner, self.weights, **self.parameters)
        return self.program(inner * self.weights * self.weights[:, None], **self.parameters) * self.weights

    def coefficients(self, inner: Tensor, modules: Sequence[str]) -> Tensor:
        """:meth:`of`, checked."""
        if not bool((inner * self.weights * self.weights[:, None]).isfinite().all()):
            raise InputError(f"the weighted updates overflow: lower the weights {self.weights.tolist()}")
        found = self.of(inner)
        check_result(self.name, modules, found, tuple(inner.shape[:2]))
        return found


def _summed(pool: Pool, module: str, coefficients: Sequence[float]) -> Update:
    adapters = pool.adapters
    return sum_updates([(coefficients[i], adapters[i].updates[module]) for i in pool.present(module)])


def _extras(pool: Pool, coefficients: CoefficientsByModule, of_equal: Callable[[Tensor], Tensor]) -> dict[str, Extra]:
    """What the adapters hold beside their updates, summed with the weights of the module that it belongs to."""
    extras: dict[str, Extra] = {}
    for name in dict.fromkeys(n for a in pool.adapters for n in a.extras):
        owner = name.rpartition(".")[0]
        while owner and owner not in coefficients:
            owner = owner.rpartition(".")[0]
        adapters = [replace(a, extras={n: e for n, e in a.extras.items() if n == name}) for a in pool.adapters]
        if owner:
            extras |= combine_extras(list(zip(coefficients[owner], adapters, strict=True)))
        else:
            extras |= _extra_of_no_module(name, adapters, of_equal)
    return extras


def _extra_of_no_module(
    name: str, adapters: Sequence[Adapter], of_equal: Callable[[Tensor], Tensor]
) -> dict[str, Extra]:
    """A replaced value is refused as in every sum, unless all that have it have the same; a change has no weight to
    take."""
    for adapter in adapters:
        if name in adapter.extras and adapter.extras[name].kind == "delta":
            raise InputError(
                f"adapter {adapter.name!r} changes {name}, which belongs to no adapted module, so this method has no "
                "weight for it. Use `adapter.without_extras()` (`--drop-extras`) to leave it out"
            )
    owns = torch.tensor([float(name in a.extras) for a in adapters], dtype=torch.float64)
    return combine_extras(list(zip(of_equal(owns).tolist(), adapters, strict=True)))
