"""Changes of parameters, dense or as two stored tensors whose difference is taken tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastlora.engine.sweeps import sweep
from fastlora.engine.tile_source import DenseMatrix, Piece, StackedMatrix, TileSource, ZeroMatrix, row_tiles
from fastlora.ops.difference_products import DTYPES
from fastlora.ops.finite import is_finite
from fastlora.runtime import memory

COMPARED = 1 << 22
"""Elements that are compared at once."""


class ParameterChange(Protocol):
    """The change of one parameter, of any number of dimensions."""

    @property
    def shape(self) -> torch.Size: ...

    def any(self) -> bool:
        """Whether something changed."""
        ...

    def dense(self) -> Tensor:
        """As a tensor, in float32 or float64."""
        ...

    def square(self) -> float:
        """``‖·‖²``."""
        ...

    def matrix(self) -> TileSource:
        """As ``[n, m]``: the first dimension against the others."""
        ...

    def expert(self, number: int) -> TileSource:
        """One of several matrices ``[experts, n, m]``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DenseChange:
    """A change that is in memory."""

    delta: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.delta.shape

    def any(self) -> bool:
        """See :class:`ParameterChange`."""
        return bool(self.delta.any())

    def dense(self) -> Tensor:
        """See :class:`ParameterChange`."""
        return self.delta

    def square(self) -> float:
        """See :class:`ParameterChange`."""
        return float(self.delta.double().square().sum())

    def matrix(self) -> TileSource:
        """See :class:`ParameterChange`."""
        return DenseMatrix(_flat(self.delta))

    def expert(self, number: int) -> TileSource:
        """See :class:`ParameterChange`."""
        return DenseMatrix(self.delta[number])


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """``θ − θ₀`` of one parameter as two models store it. ``old``, ``new`` give what is stored, multiplied out where it
    is scaled. Where one has more rows, those do not change, and the
    shape is that of ``old``. ``is_wide``: one is stored in float64."""

    old: Callable[[], Tensor]
    new: Callable[[], Tensor]
    is_wide: bool

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.old().shape

    def any(self) -> bool:
        """Whether something changed: both are read once, up to the first tile that differs. What is not finite counts
        as changed."""
        old, new = self.old(), self.new()
        if old.dim() and old.shape != new.shape:
            rows = min(len(old), len(new))
            old, new = old[:rows], new[:rows]
        first, second = old.reshape(-1), new.reshape(-1)
        same = True
        for start in range(0, len(first), COMPARED):
            one, two = first[start : start + COMPARED], second[start : start + COMPARED]
            if one.dtype != two.dtype or one.dtype.itemsize == 1:
                one, two = one.double(), two.double()
            if not (torch.equal(one, two) and is_finite(one.reshape(1, -1))):
                same = False
                break
        memory.release([old, new])
        return not same

    def dense(self) -> Tensor:
        """In float64."""
        old, new = self.old(), self.new()
        first, second = old.double(), new.double()
        if old.shape != new.shape:
            rows = min(len(old), len(new))
            delta = torch.zeros_like(first)
            delta[:rows] = second[:rows] - first[:rows]
        else:
            delta = second - first
        return delta

    def square(self) -> float:
        """See :class:`ParameterChange`."""
        matrix = self.matrix()
        try:
            return sweep(matrix, square=True, precision="float64").square or 0.0
        finally:
            matrix.release()

    def matrix(self) -> TileSource:
        """See :class:`ParameterChange`."""
        return DifferenceMatrix(_flat(self.old()), _flat(self.new()))

    def expert(self, number: int) -> TileSource:
        """See :class:`ParameterChange`."""
        return DifferenceMatrix(self.old()[number], self.new()[number])

    def equals(self, other: Difference) -> bool:
        """Whether the other one is the same change."""
        mine, theirs = self.matrix(), other.matrix()
        if mine.shape != theirs.shape:
            return False
        pairs = zip(row_tiles(mine, torch.float64), row_tiles(theirs, torch.float64), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


class DifferenceMatrix:
    """``new − old [n, m]``, tile by tile."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self.old, self.new = old, new
        self.rows = min(len(old), len(new))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, m)`` of the first model."""
        return self.old.shape[0], self.old.shape[1]

    @property
    def precise(self) -> torch.dtype:
        """float32 between numbers of float32 or of 16 bits at most, else float64."""
        dtypes = (self.old.dtype, self.new.dtype)
        return torch.float32 if all(d == torch.float32 or d.itemsize <= 2 for d in dtypes) else torch.float64

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`fastlora.engine.tile_source.TileSource`."""
        first, last, _ = rows.indices(self.shape[0])
        common = max(0, min(last, self.rows) - first)
        old, new = (t[first : first + common, columns] for t in (self.old, self.new))
        inner = out[:common]
        inner.copy_(new).sub_(old.to(out.dtype))
        out[common:].zero_()
        return out

    def stored(self) -> Sequence[Piece] | None:
        """See :class:`fastlora.engine.tile_source.TileSource`; ``None`` for dtypes that the op does not read."""
        if not {self.old.dtype, self.new.dtype} <= set(DTYPES):
            return None
        return [(slice(0, self.rows), self.old[: self.rows], self.new[: self.rows])]

    def release(self) -> None:
        """Gives back what is mapped."""
        memory.release([self.old, self.new])


@dataclass(frozen=True, slots=True, eq=False)
class ZeroChange:
    """A weight that did not change."""

    shape: torch.Size

    def any(self) -> bool:
        """See :class:`ParameterChange`."""
        return False

    def dense(self) -> Tensor:
        """See :class:`ParameterChange`."""
        return torch.zeros(self.shape)

    def square(self) -> float:
        """See :class:`ParameterChange`."""
        return 0.0

    def matrix(self) -> TileSource:
        """See :class:`ParameterChange`."""
        return ZeroMatrix((self.shape[0], self.shape[1:].numel()))

    def expert(self, number: int) -> TileSource:
        """See :class:`ParameterChange`."""
        return ZeroMatrix((self.shape[1], self.shape[2]))


@dataclass(frozen=True, slots=True, eq=False)
class ExpertChanges:
    """``[experts, Σ n_i, m]``: the weights of each expert below each other."""

    experts: Sequence[Sequence[ParameterChange]]

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        first = self.experts[0]
        return torch.Size((len(self.experts), sum(c.shape[0] for c in first), first[0].shape[1]))

    def any(self) -> bool:
        """See :class:`ParameterChange`."""
        return any(change.any() for expert in self.experts for change in expert)

    def dense(self) -> Tensor:
        """See :class:`ParameterChange`."""
        return torch.stack([torch.cat([change.dense() for change in expert]) for expert in self.experts])

    def square(self) -> float:
        """See :class:`ParameterChange`."""
        return sum(change.square() for expert in self.experts for change in expert)

    def matrix(self) -> TileSource:
        """All experts below each other."""
        return StackedMatrix([change.matrix() for expert in self.experts for change in expert])

    def expert(self, number: int) -> TileSource:
        """See :class:`ParameterChange`."""
        return StackedMatrix([change.matrix() for change in self.experts[number]])


def _flat(tensor: Tensor) -> Tensor:
    """``[n, m]``; of a vector a column, so that its rows are the parameter's."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
