"""Combine jobs: what kernels are asked for, made of factors that are wanted and of where they go.

Results in memory and in files, those that are computed once and those that a plan computes again and again: all of them
ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.core.factors import Factor, Side, source_key
from fastlora.engine.belonging import require_length, require_one_length, require_room
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm


class WantedFactor(NamedTuple):
    """A factor and where it goes in ``dtype``: into ``out``, or without one into a file, ``offset`` bytes from its
    start. A factor that holds NaN or Inf is not written to a file. ``present``: as in :class:`CombineOutput`."""

    factor: Factor
    dtype: torch.dtype
    out: Tensor | None = None
    offset: int = 0
    present: Tensor | None = None


def combine_job(wanted: Sequence[WantedFactor]) -> CombineJob:
    """The job for factors of one side of one module, its outputs in the same order; each stored matrix is read once.

    A factor that is already stored in the dtype of its file goes there as it is. The file itself is named later
    (``output.file``). Raises :class:`InputError` for factors, or terms of them, that are not of one module.
    """
    side, length = wanted[0].factor.side, wanted[0].factor.length
    matrices = _StoredMatrices(side)
    outputs = []
    for factor, dtype, out, offset, present in wanted:
        if factor.length != length:
            require_one_length([w.factor for w in wanted])
        stored = stored_as(factor, dtype) if out is None else None
        if stored is not None and stored.is_contiguous():
            outputs.append(CombineOutput.copy(stored, -1, offset, True))
        else:
            terms = matrices.terms(factor)
            outputs.append(CombineOutput(factor.shape, dtype, terms, out, -1, offset, out is None, present))
    return CombineJob(matrices.tensors, outputs, side == "A")


def stored_as(factor: Factor, dtype: torch.dtype) -> Tensor | None:
    """The stored matrix that a factor is, if it has that dtype."""
    stored = factor.stored
    return stored if stored is not None and stored.dtype == dtype else None


class _StoredMatrices:
    """The distinct stored matrices of a job, in order of first use."""

    def __init__(self, side: Side) -> None:
        self.tensors: list[Tensor] = []
        self._inner = 1 if side == "B" else 0  # the short dimension
        self._widths: list[int] = []
        self._index: dict[int, int] = {}  # by object
        self._at_address: dict[int, list[int]] = {}

    def terms(self, factor: Factor) -> list[CombineTerm]:
        """The terms of a factor on these matrices."""
        terms: list[CombineTerm] = []
        inner, rank = self._inner, factor.rank
        for term in factor.terms:
            source, coefficient, at = term.source, term.coefficient, term.at
            index = self._index.get(id(source))
            if index is None:
                require_length(factor, source)
                index = self._index[id(source)] = self._index_of(source)
            width, fits = self._widths[index], True
            if coefficient is not None:
                shape = coefficient.shape
                width, fits = shape[inner], shape[1 - inner] == width
            if not fits or not 0 <= at <= rank - width:
                require_room(factor, term)
            terms.append((index, coefficient, at, term.scale))
        return terms

    def _index_of(self, source: Tensor) -> int:
        """Of a tensor that was not met before: that of another view of the same memory, or a new one."""
        here = self._at_address.setdefault(source.data_ptr(), [])
        for index in here:
            if source_key(self.tensors[index]) == source_key(source):
                return index
        here.append(len(self.tensors))
        self.tensors.append(source)
        self._widths.append(source.shape[self._inner])
        return here[-1]
