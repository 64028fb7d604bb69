"""The form of methods that work on the elements of ``ΔW``: tile by tile, no ``ΔW_i`` is ever there as a whole.

By the formulas in torch, in float64, where the factors are. A rule on elements makes a matrix of full rank: the merged
``ΔW`` of one module at a time is there, and is cut to a low rank by its singular value decomposition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import MIN_RTOL, Noise, Update, joint_noise, sources, with_rank_zero
from fastlora.engine.checks import LARGEST, require_finite
from fastlora.engine.materialise import is_rounding, materialise
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms.frames import Cut
from fastlora.merging.forms.result import check_result, merged_adapter
from fastlora.merging.registry import driven
from fastlora.reference.tiles import tile
from fastlora.runtime.memory import batch_bytes, release
from fastlora.runtime.progress import track

Program = TypeVar("Program", bound=Callable[..., Tensor])

# Of the tiles of all adapters together; what a program computes with them is a few times as large.
TILE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The ``w_i ΔW_i`` of one module ``[n, m]``, tile by tile, as often as they are gone through.

    ``factors``: of every adapter of the pool, weight and scaling in ``B``; ``None`` where it is zero. ``side``: rows
    and columns of a tile. Every pass gives the same tiles, float64 ``[k, rows, columns]``, in the same order.
    """

    factors: Sequence[tuple[Tensor, Tensor] | None]
    shape: tuple[int, int]
    side: int

    def __iter__(self) -> Iterator[Tensor]:
        for rows, columns in self.places():
            yield tile(self.factors, rows, columns, self.shape)

    @property
    def device(self) -> torch.device:
        """Where the tiles are."""
        return next((pair[0].device for pair in self.factors if pair is not None), torch.device("cpu"))

    def places(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the tiles, in their order."""
        n, m = self.shape
        starts = ((i, j) for i in range(0, n, self.side) for j in range(0, m, self.side))
        return [(slice(i, min(i + self.side, n)), slice(j, min(j + self.side, m))) for i, j in starts]


def method(*, summary: str, source: str, measure: Callable[..., object] | None = None) -> Callable[[Program], Program]:
    """Registers ``program(tile, *, …)``, or ``program(tile, measured, *, …)`` with ``measure``; :func:`merge` runs it.

    ``measure(tiles, *, …)`` looks at all :class:`Tiles` of a module first, as often as it wants: quantiles, counts. It
    takes those of the method's parameters that it names.
    """
    return driven("tiles", merge, summary, source, measure)


def merge(
    program: Callable[..., Tensor],
    measure: Callable[..., object] | None,
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: object,
) -> Adapter:
    """The best approximation of low rank of ``program`` of the elements of all ``w_i ΔW_i``.

    Args:
        program: takes a float64 tile ``[k, rows, columns]`` of the ``k`` adapters of the pool, and what ``measure``
            found in the module, and returns the merged ``[rows, columns]``. An adapter that lacks a module is zero
            there. A result must not depend on how a module is cut into tiles.
        measure: see :func:`method`.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank of the result; give it or an energy
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank

    Raises:
        InputError: no cut, both cuts or one out of range; a result that overflows.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: for every module ``2·k·r·n·m`` operations each time that its tiles are gone through, and the singular value
    decomposition of a dense ``n×m`` matrix, ``O(n·m·min(n, m))`` operations and four times its size in memory.
    """
    name = program.__name__
    if rank is None and energy is None:
        raise InputError(
            f"method {name!r} gives matrices of full rank: give the rank of the result, or the energy to keep"
        )
    check_cut(rank, energy)
    require_finite(pool.adapters)  # no Gram pass here would find NaN
    given = [weights[n] for n in pool.names]
    updates: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}
    for module in track(pool.modules, f"merging by {name}"):
        present = pool.present(module)
        row = [pool.adapters[i].updates[module] for i in present]
        dense = _merged(program, measure, module, tiles_of(pool, module, given), parameters)
        noise = joint_noise(u.noise.scaled(given[i]) for i, u in zip(present, row, strict=True))
        rtol, floor = (torch.tensor([x], dtype=torch.float64) for x in (MIN_RTOL, noise.rounding))
        updates[module], squares[module] = _cut(dense, row, Cut(rtol, floor, rank, energy), noise)
        release(sources(row))
    used = {"rank": rank, "energy": energy, **parameters}
    return merged_adapter(name, pool, given, updates, used, squares=squares)


def _merged(
    program: Callable[..., Tensor],
    measure: Callable[..., object] | None,
    module: str,
    tiles: Tiles,
    parameters: Mapping[str, object],
) -> Tensor:
    """What a program makes of all tiles of a module: ``[n, m]``."""
    inputs: list[object] = []
    if measure is not None:
        asked = inspect.signature(measure).parameters
        inputs = [measure(tiles, **{name: value for name, value in parameters.items() if name in asked})]
    dense = torch.empty(tiles.shape, dtype=torch.float64, device=tiles.device)
    for (rows, columns), values in zip(tiles.places(), tiles, strict=True):
        if not bool((values.abs() <= LARGEST).all()):  # not so with NaN, either
            raise InputError(f"the weighted updates of {module} overflow: lower the weights")
        result = program(values, *inputs, **parameters)
        check_result(program.__name__, [module], result[None], (1, *values.shape[1:]))
        dense[rows, columns] = result
    return dense


def tiles_of(pool: Pool, module: str, weights: Sequence[float], side: int | None = None) -> Tiles:
    """The tiles of one module, with weights in the order of the pool; as large as memory allows by default."""
    present = pool.present(module)
    updates = [pool.adapters[i].updates[module] for i in present]
    factors: list[tuple[Tensor, Tensor] | None] = [None] * len(pool)
    for i, update, (B, A) in zip(present, updates, materialise(updates, torch.float64), strict=True):
        if update.rank and not is_rounding(update.B, B) and not is_rounding(update.A, A):
            factors[i] = B * (weights[i] * update.scaling), A
    if side is None:
        side = max(1, math.isqrt(batch_bytes(TILE_BYTES) // (8 * len(pool))))
    return Tiles(factors, updates[0].shape, side)


def _cut(dense: Tensor, row: Sequence[Update], cut: Cut, noise: Noise) -> tuple[Update, tuple[float, float]]:
    """``ΔW = (U√Σ)(√ΣVᵀ)`` of what is kept of a merged module, and the ``Σσ²`` that is kept and that of all.

    ``row``: updates of the module, for its layout and dtype.
    """
    U, sigma, Vt = torch.linalg.svd(dense, full_matrices=False)
    sigma = sigma.cpu()
    count, squares = int(cut(sigma[None])), sigma.square()
    energies = float(squares[:count].sum()), float(squares[:count].sum() + squares[count:].sum())
    if not count:
        return with_rank_zero(row[0]), energies
    dtype = torch.float64 if torch.float64 in {d for u in row for d in u.dtypes()} else torch.float32
    root = sigma[:count].sqrt().to(dense.device)
    B, A = (U[:, :count] * root).to(dtype).contiguous(), (root[:, None] * Vt[:count]).to(dtype).contiguous()
    return Update(Factor.of("B", B), Factor.of("A", A), 1.0, row[0].layout, noise), energies
