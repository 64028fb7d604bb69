"""Factors as tensors: every result of a module from one read of its stored matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.core.factors import Factor, device_of
from fastlora.core.float64 import of_float64
from fastlora.core.updates import Update
from fastlora.engine.belonging import require_together
from fastlora.engine.buffers import ResultRoom, padded
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.ops.dispatch import run_pass, shortcut
from fastlora.runtime.cpython import paused_collector

# Relative to the terms of a sum: what is left below it has no digit that is known, through Gram blocks in float64.
ROUNDING = 1e-7

_NOTHING = torch.empty(0)
"""Stands where a result is still to be computed."""


def materialise(updates: Sequence[Update], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """``(B [out, r], A [r, in])`` of each update of one module in ``dtype``, without the scaling (see
    :meth:`Update.baked`).

    A factor that is a stored matrix of that dtype is returned as it is, bit for bit. Updates that share stored
    matrices should be passed together: each is read once. Raises :class:`InputError` for updates that are not of one
    module: of other shapes, layouts or devices.
    """
    return materialise_groups([updates], dtype)[0]


def materialise_groups(
    groups: Sequence[Sequence[Update]], dtype: torch.dtype, room: ResultRoom | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """:func:`materialise` for many groups of updates in one launch; the updates of a group are of one module.

    ``room``: where results go, until it is reserved again; memory of their own by default.
    """
    with paused_collector():
        for group in groups:
            require_together(group)
        sides = [side for group in groups for side in ([u.B for u in group], [u.A for u in group])]
        results = _materialise_sides(sides, dtype, room)
        return [list(zip(*pair, strict=True)) for pair in zip(results[::2], results[1::2], strict=True)]


def materialise_factor(factor: Factor, dtype: torch.dtype) -> Tensor:
    """:func:`materialise` for one factor alone: ``[length, rank]`` (B side) or ``[rank, length]``."""
    return _materialise_sides([[factor]], dtype, None)[0][0]


def _materialise_sides(
    sides: Sequence[Sequence[Factor]], dtype: torch.dtype, room: ResultRoom | None
) -> list[list[Tensor]]:
    """The tensors of the factors of one side of one module, for many of them in one launch."""
    results: list[list[Tensor]] = []
    gaps: list[tuple[list[Tensor], list[int], Sequence[Factor]]] = []  # of a side: the places of what is computed
    counts: dict[tuple[int, int], int] = {}
    empty: dict[tuple[int, int], Tensor] = {}
    device = device_of(sides)
    for side in sides:
        made = [_NOTHING if (x := factor.stored) is None or x.dtype != dtype else x for factor in side]
        results.append(made)
        missing: list[int] = []
        for place, factor in enumerate(side):
            if made[place] is not _NOTHING:
                continue
            shape = factor.shape
            if factor.rank and factor.length:
                missing.append(place)
                counts[shape] = counts.get(shape, 0) + 1
            elif shape in empty:
                made[place] = empty[shape]
            else:
                made[place] = empty[shape] = torch.empty(shape, dtype=dtype, device=device)
        if missing:
            gaps.append((made, missing, side))
    if not gaps:
        return results
    room = room or ResultRoom(device)
    room.reserve(sum(count * padded(n * m * dtype.itemsize) for (n, m), count in counts.items()))
    outs = {shape: iter(room.take(shape, dtype, count)) for shape, count in counts.items()}
    wanted: list[tuple[list[Factor], list[Tensor]]] = []
    for made, missing, side in gaps:
        factors = [side[place] for place in missing]
        targets = [next(outs[factor.shape]) for factor in factors]
        for place, out in zip(missing, targets, strict=True):
            made[place] = out
        wanted.append((factors, targets))
    _compute(wanted, device)
    return results


def _compute(wanted: Sequence[tuple[list[Factor], list[Tensor]]], device: torch.device) -> None:
    """The factors of every side into their results."""
    if shortcut("factor_pass", device.type, wanted):
        return
    # Where factors do not belong together nothing was computed, and combine_job says why, in words.
    jobs = [
        combine_job([WantedFactor(factor, out.dtype, out) for factor, out in zip(factors, targets, strict=True)])
        for factors, targets in wanted
    ]
    run_pass("combine_pass", jobs)


def is_rounding(factor: Factor, computed: Tensor) -> bool:
    """Whether a factor that was ``computed`` in float64 is nothing but the rounding of what its terms cancel to: each
    of its elements would count as one elsewhere. Costs a read of its stored matrices."""
    if len(factor.terms) < 2:
        return False
    size = 0.0
    for term in factor.terms:
        coefficient = 1.0 if term.coefficient is None else float(term.coefficient.norm())
        size += abs(term.scale) * coefficient * float(term.source.to(of_float64(term.source.device)).double().norm())
    return float(computed.norm()) <= ROUNDING * size
