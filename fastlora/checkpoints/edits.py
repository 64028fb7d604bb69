"""What is added to a stored tensor, and the arithmetic of one tile of it.

A tensor is a matrix ``W [rows, columns]`` (:func:`fastlora.checkpoints.base.matrix_shape`). An :class:`Edit` changes a
block of it. A tile is rounded once, to its dtype, from a sum in float32; in float64 where ``W`` or a factor is float32
or wider. The kinds of edits, with the weight ``w`` of their adapter::

    LowRank     W + w·s·L R                               L [height, r], R [r, width]
    Rescaled    W + w·(D (W + s·L R) − W)                 D = m / ‖W + s·L R‖, by rows or by columns (DoRA)
    Stretched   W + w·(l − 1)·W                           by rows or by columns ((IA)³)
    Added       W + w·X                                   biases, task vectors
    Replaced    W + w·(X − W); X itself where it is alone and w = 1
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.core.updates import Update, sources
from fastlora.engine.materialise import is_rounding, materialise_factor
from fastlora.errors import NonFiniteError
from fastlora.merging.forms.full_rank import FullRank
from fastlora.ops.add_products import ProductTask, Segment, add_products

LEAST, MOST = 1e-16, 1e16  # sizes that float32 forms without overflow, and without loss beside others


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """``scale·L R``. ``wide``: whether its elements need float64."""

    left: Tensor
    right: Tensor
    scale: float
    wide: bool

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The factors of some rows."""
        return self.left[start:stop], self.right


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Edit:
    """A change of the block of ``height × width`` at row ``at`` and column ``left``; ``weight``: of its adapter."""

    at: int
    height: int
    left: int
    width: int
    weight: float

    @property
    def is_wide(self) -> bool:
        """Whether sums need float64."""
        return False

    def tensors(self) -> list[Tensor]:
        """What it is made of: a run that is resumed has the same."""
        return []

    def numbers(self) -> list[float]:
        """The numbers beside these."""
        return [self.weight]

    def change(self, tile: Tensor, start: int) -> Tensor:
        """``w·ΔW`` of the rows ``start, …`` of the block, for ``tile``: their ``W``, float32 or float64."""
        raise NotImplementedError

    def measure(self, tile: Tensor, start: int) -> None:
        """Looks at rows before any is changed; see :attr:`is_measured`."""

    @property
    def is_measured(self) -> bool:
        """Whether all rows must be looked at before one is changed."""
        return False

    def alone(self, tile: Tensor, start: int) -> Tensor:
        """The rows of the result where this is the only change."""
        return tile + self.change(tile, start)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LowRank(Edit):
    """``w·s·L R``."""

    pair: Pair

    @property
    def is_wide(self) -> bool:
        return self.pair.wide

    def tensors(self) -> list[Tensor]:
        return [self.pair.left, self.pair.right]

    def numbers(self) -> list[float]:
        return [self.weight, self.pair.scale]

    def change(self, tile: Tensor, start: int) -> Tensor:
        out = torch.zeros_like(tile)
        _add(out, self.pair.rows(start, start + len(tile)), self.weight * self.pair.scale)
        return out


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rescaled(Edit):
    """DoRA: magnitudes ``[height]`` by rows, or by columns in groups of ``group`` (the kernel of a channel).

    ``squares``: of columns, ``‖W + s·L R‖²``, which are summed in a pass over the rows before they are changed.
    """

    pair: Pair
    magnitude: Tensor
    by_columns: bool
    group: int = 1
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def is_wide(self) -> bool:
        return self.pair.wide

    @property
    def is_measured(self) -> bool:
        return self.by_columns

    def tensors(self) -> list[Tensor]:
        return [self.pair.left, self.pair.right, self.magnitude]

    def numbers(self) -> list[float]:
        return [self.weight, self.pair.scale, float(self.by_columns), float(self.group)]

    def measure(self, tile: Tensor, start: int) -> None:
        squares = self._sum(tile, start).double().square_().sum(0)
        self.squares.add_(squares.view(-1, self.group).sum(1))

    def change(self, tile: Tensor, start: int) -> Tensor:
        return (self._rescaled(tile, start) - tile).mul_(self.weight)

    def alone(self, tile: Tensor, start: int) -> Tensor:
        if self.weight == 1.0:
            return self._rescaled(tile, start)
        return tile + self.change(tile, start)

    def _sum(self, tile: Tensor, start: int) -> Tensor:
        out = tile.clone()
        _add(out, self.pair.rows(start, start + len(tile)), self.pair.scale)
        return out

    def _rescaled(self, tile: Tensor, start: int) -> Tensor:
        out = self._sum(tile, start)
        if self.by_columns:
            norms = self.squares.sqrt()
            return out.mul_((self.magnitude / norms).repeat_interleave(self.group).to(out.dtype))
        norms = torch.linalg.vector_norm(out, dim=1, dtype=torch.float64)
        return out.mul_((self.magnitude[start : start + len(tile)] / norms).to(out.dtype)[:, None])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stretched(Edit):
    """(IA)³: ``l [height]`` by rows, or ``[width]`` by columns."""

    vector: Tensor
    by_columns: bool

    def tensors(self) -> list[Tensor]:
        return [self.vector]

    def numbers(self) -> list[float]:
        return [self.weight, float(self.by_columns)]

    def change(self, tile: Tensor, start: int) -> Tensor:
        return tile * ((self._vector(start, len(tile)) - 1.0) * self.weight).to(tile.dtype)

    def alone(self, tile: Tensor, start: int) -> Tensor:
        return tile * (1.0 + (self._vector(start, len(tile)) - 1.0) * self.weight).to(tile.dtype)

    def _vector(self, start: int, count: int) -> Tensor:
        return self.vector if self.by_columns else self.vector[start : start + count, None]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Added(Edit):
    """``w·scale·X`` for ``X [height, width]``."""

    values: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def change(self, tile: Tensor, start: int) -> Tensor:
        return self.values[start : start + len(tile)].to(tile.dtype) * self.weight


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Replaced(Edit):
    """``X [height, width]`` in place of ``W``."""

    values: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def change(self, tile: Tensor, start: int) -> Tensor:
        return (self.values[start : start + len(tile)].to(tile.dtype) - tile) * self.weight

    def alone(self, tile: Tensor, start: int) -> Tensor:
        if self.weight == 1.0:
            return self.values[start : start + len(tile)]
        return tile + self.change(tile, start)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Merged(Edit):
    """The rows ``[first, last)`` of the matrix that a method makes of a module ``[n, m]``, transposed where they are
    ``turned``. It is formed as a whole."""

    of: FullRank
    module: str
    shape: tuple[int, int]
    rows: tuple[int, int]
    turned: bool

    @property
    def is_whole(self) -> bool:
        """Whether the matrix goes onto rows of the weight as they are."""
        return not self.turned and self.rows == (0, self.shape[0]) and self.left == 0

    def tensors(self) -> list[Tensor]:
        pool = self.of.pool
        return sources(pool.adapters[i].updates[self.module] for i in pool.present(self.module))

    def add_to(self, rows: Tensor) -> bool:
        """Adds the whole matrix to rows of a weight, in place; whether it is finite."""
        return self.of.add_to(self.module, rows)

    def formed(self) -> Added:
        """The change as a matrix in memory, in float32, or float64 where a factor is."""
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in self.tensors()) else torch.float32
        M = torch.zeros(self.shape, dtype=dtype)
        self.add_to(M)
        values = M[self.rows[0] : self.rows[1]]
        block = {"at": self.at, "height": self.height, "left": self.left, "width": self.width, "weight": self.weight}
        return Added(**block, values=values.mT if self.turned else values)  # type: ignore[arg-type]


def pair_of(update: Update, *, turned: bool = False) -> Pair | None:
    """The factors of an update as they are stored, or in float64 where they have to be computed; ``None`` for zero.

    ``turned``: those of ``ΔWᵀ = Aᵀ Bᵀ``.
    """
    if not update.rank:
        return None
    sides, scale, wide = [], update.scaling, False
    for factor in (update.B, update.A):
        stored = _stored(factor)
        if stored is None:
            computed = materialise_factor(factor, torch.float64)
            if is_rounding(factor, computed):
                return None
            stored = computed, 1.0
        matrix, own = stored[0].cpu(), stored[1]
        size = _largest(matrix) if matrix.numel() else 0.0
        if not math.isfinite(size):
            raise NonFiniteError(
                f"a factor {list(matrix.shape)} of the adapter holds NaN or Inf; leave this adapter out, or save it "
                "again from a training step that did not diverge"
            )
        wide |= matrix.dtype == torch.float64 or not (_is_ordinary(size) and _is_ordinary(size * scale * own))
        sides.append(matrix)
        scale *= own
    left, right = sides
    if turned:
        left, right = right.mT.contiguous(), left.mT.contiguous()
    return Pair(left, right, scale, wide or not _is_ordinary(scale))


def _largest(matrix: Tensor) -> float:
    """``max |x|``, NaN where there is one; without a copy of the matrix."""
    least, most = matrix.aminmax()
    return float(torch.maximum(-least, most))


def _stored(factor: Factor) -> tuple[Tensor, float] | None:
    if len(factor.terms) != 1:
        return None
    (term,) = factor.terms
    whole = term.coefficient is None and tuple(term.source.shape) == factor.shape
    return (term.source, term.scale) if whole else None


def _is_ordinary(size: float) -> bool:
    return size == 0.0 or LEAST <= abs(size) <= MOST


def products(
    edits: Sequence[LowRank], first: int, last: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> ProductTask:
    """What edits of the rows ``[first, last)`` add to them, for the dtypes that they have and get."""
    cuts = sorted({0, columns, *(e.left for e in edits), *(e.left + e.width for e in edits)})
    segments = []
    for left, right in itertools.pairwise(cuts):
        here = [e for e in edits if e.left <= left and right <= e.left + e.width]
        pairs = [
            (e.pair.left[first - e.at : last - e.at], e.pair.right[:, left - e.left : right - e.left]) for e in here
        ]
        segments.append(Segment(left, right - left, pairs, [e.weight * e.pair.scale for e in here]))
    wide = dtypes[0].itemsize > 2 or any(edit.is_wide for edit in edits)
    return ProductTask((last - first, columns), segments, *dtypes, torch.float64 if wide else torch.float32, 1)


def _add(tile: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> None:
    """``tile += scale·L R`` in place, for rows that are float32 or float64, as sums are."""
    n, m = tile.shape
    task = ProductTask((n, m), [Segment(0, m, [pair], [scale])], tile.dtype, tile.dtype, tile.dtype, 1)
    add_products(task, tile, tile)


def blocks(edits: Sequence[Edit], start: int, stop: int) -> Iterator[tuple[int, int, list[Edit]]]:
    """Stretches of the rows ``[start, stop)`` that the same edits change: ``(first, end, edits)``, in order; those that
    none changes too."""
    ends = (end for e in edits for end in (e.at, e.at + e.height))
    cuts = sorted({start, stop, *(end for end in ends if start < end < stop)})
    for first, end in itertools.pairwise(cuts):
        yield first, end, [e for e in edits if e.at <= first and end <= e.at + e.height]


def fingerprint(edits: Sequence[Edit]) -> str:
    """A digest of everything that some edits depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for edit in edits:
        place = (type(edit).__name__, edit.at, edit.height, edit.left, edit.width, edit.numbers())
        digest.update(repr(place).encode())
        for tensor in edit.tensors():
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            flat = tensor.detach().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
