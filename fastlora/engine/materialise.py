"""Factors as tensors: every result of a module from one read of its stored matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastlora.core.factors import Factor, device_of
from fastlora.core.updates import Update
from fastlora.engine.buffers import ResultRoom, padded
from fastlora.engine.combine_jobs import WantedFactor, combine_job, require_one_length, stored_as
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob

# Relative to the terms of a sum: what is left below it has no digit that is known, through Gram blocks in float64.
ROUNDING = 1e-7


def materialise(updates: Sequence[Update], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """``(B [out, r], A [r, in])`` of each update of one module in ``dtype``, without the scaling (see
    :meth:`Update.baked`).

    A factor that is a stored matrix of that dtype is returned as it is, bit for bit. Updates that share stored
    matrices should be passed together: each is read once. Raises :class:`InputError` for updates of different shapes,
    which are of different modules.
    """
    return materialise_groups([updates], dtype)[0]


def materialise_groups(
    groups: Sequence[Sequence[Update]], dtype: torch.dtype, room: ResultRoom | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """:func:`materialise` for many groups of updates in one launch; the updates of a group are of one module.

    ``room``: where results go, until it is reserved again; memory of their own by default.
    """
    sides = [side for group in groups for side in ([u.B for u in group], [u.A for u in group])]
    for side in sides:
        require_one_length(side)
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
    return [list(zip(*pair, strict=True)) for pair in zip(results[::2], results[1::2], strict=True)]


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
