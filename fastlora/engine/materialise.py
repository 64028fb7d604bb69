"""Factors as tensors: every result of a module from one read of its stored matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastlora.core.factors import Factor, device_of
from fastlora.core.updates import Update
from fastlora.engine.belonging import require_one_device, require_one_module
from fastlora.engine.buffers import ResultRoom, padded
from fastlora.engine.combine_jobs import WantedFactor, combine_job, stored_as
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob

# Relative to the terms of a sum: what is left below it has no digit that is known, through Gram blocks in float64.
ROUNDING = 1e-7


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
    for group in groups:
        require_one_module(group)
        require_one_device(group)
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
    stored = [[stored_as(f, dtype) for f in side] for side in sides]
    room = room or ResultRoom(device_of(sides))
    room.reserve(
        sum(
            padded(f.length * f.rank * dtype.itemsize)
            for side, matrices in zip(sides, stored, strict=True)
            for f, matrix in zip(side, matrices, strict=True)
            if matrix is None
        )
    )
    jobs: list[CombineJob] = []
    results = [_materialise_side(jobs, *pair, dtype, room) for pair in zip(sides, stored, strict=True)]
    run_pass("combine_pass", jobs)
    return results


def is_rounding(factor: Factor, computed: Tensor) -> bool:
    """Whether a factor that was ``computed`` in float64 is nothing but the rounding of what its terms cancel to: each
    of its elements would count as one elsewhere. Costs a read of its stored matrices."""
    if len(factor.terms) < 2:
        return False
    size = 0.0
    for term in factor.terms:
        coefficient = 1.0 if term.coefficient is None else float(term.coefficient.norm())
        size += abs(term.scale) * coefficient * float(term.source.double().norm())
    return float(computed.norm()) <= ROUNDING * size


def _materialise_side(
    jobs: list[CombineJob],
    factors: Sequence[Factor],
    stored: Sequence[Tensor | None],
    dtype: torch.dtype,
    room: ResultRoom,
) -> list[Tensor]:
    """The tensors of some factors of one side; those that are not ``stored`` are put on the job list."""
    there = [matrix for matrix in stored if matrix is not None]
    if len(there) == len(stored):
        return there
    shapes = [factor.shape for factor, matrix in zip(factors, stored, strict=True) if matrix is None]
    outs = iter([out for shape, same in groupby(shapes) for out in room.take(shape, dtype, len(list(same)))])
    results = [next(outs) if matrix is None else matrix for matrix in stored]
    wanted = [
        WantedFactor(factor, dtype, out)
        for factor, matrix, out in zip(factors, stored, results, strict=True)
        if matrix is None and factor.rank
    ]
    if wanted:
        jobs.append(combine_job(wanted))
    return results
