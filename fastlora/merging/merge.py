"""``fl.merge``: one adapter from many, by a method of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.placing import place
from fastlora.adapters.pool import Pool
from fastlora.engine.checks import require_finite, require_finite_extras
from fastlora.errors import InputError, NonFiniteError
from fastlora.merging.input_rows import Statistics
from fastlora.merging.registry import Method, all_methods, find_method
from fastlora.runtime import devices
from fastlora.runtime.cpython import paused_collector


@paused_collector()
def merge(
    pool: Pool,
    weights: Mapping[str, float] | None = None,
    *,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    data: Statistics | str | Path | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    **parameters: object,
) -> Adapter:
    """Makes one adapter of a pool: the weighted sum ``Σ_i w_i ΔW_i``, or what ``method`` puts in its place.

    Args:
        pool: the adapters. Ranks, dtypes and modules may differ; a module that an adapter lacks counts as zero.
        weights: ``{name: w_i}``, finite numbers. ``None`` gives every adapter the weight 1. An adapter that is not
            named has the weight 0, which the result's ``notes`` say.
        method: one of :func:`methods`, which gives the form, the parameters and the source of each; docs/methods.md.
            ``"svd"``: the best approximation of ``Σ_i w_i ΔW_i`` of a given rank (Eckart–Young), MATH section 6.
            ``"cat"``: the sum itself, ``B = [w_1 s_1 B_1 | w_2 s_2 B_2 | …]`` and ``A = [A_1; A_2; …]``.
            ``"pem"``: ``(Σ_i λ_i B_i)(Σ_j λ_j A_j)`` with ``λ_i = w_i / Σ_j w_j``, MATH (10b), arXiv 2306.14870.
        rank: of methods that cut: the rank of the result, at least 1. Of ``"svd"`` by default the largest rank in the
            pool.
        energy: instead of ``rank``: the share of ``Σσ²`` that every module keeps, in ``(0, 1]``.
        data: for methods that use the inputs of modules (``"regmean"``, ``"ssr"``): what :func:`fastlora.statistics`
            found for every adapter, or the file that it was saved in.
        memory: bound on the peak resident memory while this computes, as bytes or ``"1GiB"``; factors that were loaded
            from files are given back to the system after use. The result has the same bits. With a ``device`` it
            bounds the memory taken there: modules are streamed through it when the pool does not fit.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the pool is.
        **parameters: those of the method.

    Returns:
        :class:`Adapter` with ``B [n, q]`` and ``A [q, m]`` for every module ``[n, m]`` that some adapter has. The rank
        ``q`` is ``Σ_i r_i`` with ``"cat"``, at most ``rank`` with ``"svd"`` and that of the inputs with ``"pem"``. The
        dtype is the widest of the pool; float16 with bfloat16 gives float32.

    Raises:
        InputError: an unknown method or name, a weight that is not finite, a parameter that the method does not take,
            or needs, or that is of another type or out of range, biases or replaced modules that cannot be summed, a
            sum that overflows, a device that cannot be used or bounded; with ``"pem"``, modules, ranks or scalings that
            differ.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: one read of all factors, and with ``"svd"`` ``O((Σ_i r_i)³)`` operations a module; docs/methods.md has the
    costs of the forms. Saving the result reads the factors once more and writes. Nothing of size ``n×m`` is formed,
    except of small modules by methods of the form ``tiles``, and by those of them that are written in torch.
    """
    chosen = find_method(method)
    counted, notes = full_weights(pool, weights)
    statistics = Statistics.load(data) if isinstance(data, str | Path) else data
    require_finite_extras(pool.adapters)
    placed = place(pool.adapters, devices.parse(device) or pool.device, memory)
    pool = pool.to(placed.device)
    try:
        with placed.in_use():
            merged = chosen(pool, counted, statistics, rank=rank, energy=energy, **parameters)
    except NonFiniteError:
        require_finite(pool.adapters)  # names the adapter of the pool; the method only knows their sum
        raise InputError(f"the weighted sum overflows: lower the weights {counted}") from None
    return replace(merged, notes=(*merged.notes, *notes)) if notes else merged


def full_weights(pool: Pool, weights: Mapping[str, float] | None) -> tuple[dict[str, float], list[str]]:
    """A finite weight for every adapter of the pool, and notices of what was left to 0."""
    if weights is None:
        return dict.fromkeys(pool.names, 1.0), []
    unknown = [n for n in weights if n not in pool.names]
    if unknown:
        raise InputError(
            f"weights name {', '.join(map(repr, unknown))}, which the pool does not have: {', '.join(pool.names)}"
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or weight != weight or weight in (float("inf"), float("-inf")):
            raise InputError(f"weight of {name!r} is {weight!r}: it must be a finite number")
    missing = [n for n in pool.names if n not in weights]
    notes = [f"{name} has no weight and counts 0" for name in missing]
    return {n: float(weights.get(n, 0.0)) for n in pool.names}, notes


def methods() -> dict[str, Method]:
    """Lists the merge methods, which :func:`merge` and ``fastlora merge --method`` accept.

    Returns:
        ``{name: method}`` in the order of names. Each has ``name``, ``form`` (what it is a function of: ``"weights"``,
        ``"cores"``, ``"tiles"`` or ``"factors"``), ``summary`` (one line with its formula), ``parameters``
        (``{parameter: record}``, a record with ``kind``, ``default``, ``required``, ``choices`` and ``help``),
        ``source`` (the paper or the section of MATH), ``needs`` (what must be given beside weights), ``cost`` (its
        class in docs/methods.md) and ``rank`` (of the result, in a module).

    Cost: none beyond the first import of the methods; no tensor is read.
    """
    return all_methods()
