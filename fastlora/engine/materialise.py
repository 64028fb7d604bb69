"""Factors as tensors: every result of a module from one read of its stored matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastlora.core.factors import Factor, device_of, source_key
from fastlora.core.updates import Update
from fastlora.engine.buffers import Room, padded
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm
from fastlora.runtime.cpython import paused_collector


def materialise(updates: Sequence[Update], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """``(B [out, r], A [r, in])`` of each update in ``dtype``, scaling not included (see :meth:`Update.baked`).

    A factor that is a stored matrix of that dtype is returned as it is, bit for bit. Updates that share stored
    matrices should be passed together: each is read once.
    """
    return materialise_groups([updates], dtype)[0]


@paused_collector()
def materialise_groups(
    groups: Sequence[Sequence[Update]], dtype: torch.dtype, room: Room | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """:func:`materialise` for many groups of updates in one launch; the updates of a group share stored matrices.

    ``room``: where results go, until it is reserved again; memory of their own by default.
    """
    sides = [side for group in groups for side in ([u.B for u in group], [u.A for u in group])]
    stored = [[_stored_as(f, dtype) for f in side] for side in sides]
    room = room or Room(device_of(sides))
    room.reserve(
        sum(
            padded(f.length * f.rank * dtype.itemsize)
            for side, found in zip(sides, stored, strict=True)
            for f, s in zip(side, found, strict=True)
            if s is None
        )
    )
    jobs: list[CombineJob] = []
    results = [_materialise_side(jobs, *pair, dtype, room) for pair in zip(sides, stored, strict=True)]
    run_pass("combine_pass", jobs)
    return [list(zip(*pair, strict=True)) for pair in zip(results[::2], results[1::2], strict=True)]


def _stored_as(factor: Factor, dtype: torch.dtype) -> Tensor | None:
    """The stored matrix that a factor is, if it has that dtype."""
    stored = factor.stored
    return stored if stored is not None and stored.dtype == dtype else None


def _materialise_side(
    jobs: list[CombineJob], factors: Sequence[Factor], stored: Sequence[Tensor | None], dtype: torch.dtype, room: Room
) -> list[Tensor]:
    """The tensors of some factors of one side; those that are not ``stored`` are put on the job list."""
    shapes = [factor.shape for factor, found in zip(factors, stored, strict=True) if found is None]
    outs = iter([out for shape, same in groupby(shapes) for out in room.take(shape, dtype, len(list(same)))])
    results = [next(outs) if found is None else found for found in stored]
    sources = Sources()
    outputs = [
        CombineOutput(factor.shape, dtype, sources.terms(factor), out)
        for factor, found, out in zip(factors, stored, results, strict=True)
        if found is None and factor.rank
    ]
    if outputs:
        jobs.append(CombineJob(sources.tensors, outputs, factors[0].side == "A"))
    return results


class Sources:
    """The distinct stored matrices of a combine job, in order of first use."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}
        self._places: dict[int, list[int]] = {}  # by address

    def terms(self, factor: Factor) -> list[CombineTerm]:
        """The terms of a factor on these matrices."""
        found = []
        for term in factor.terms:
            index = self._index.get(id(term.source))
            if index is None:
                index = self._index[id(term.source)] = self._place(term.source)
            found.append((index, term.coefficient, term.at, term.scale))
        return found

    def _place(self, source: Tensor) -> int:
        """Of a tensor that was not met before: that of another view of the same memory, or a new one."""
        here = self._places.setdefault(source.data_ptr(), [])
        for index in here:
            if source_key(self.tensors[index]) == source_key(source):
                return index
        here.append(len(self.tensors))
        self.tensors.append(source)
        return here[-1]
