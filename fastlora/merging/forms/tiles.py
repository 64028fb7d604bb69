"""The form of methods that work on the elements of ``ΔW``: tile by tile, no ``ΔW_i`` is ever there as a whole.

A method file holds one of two functions:

* **A rule that the kernels have.** ``@rule(summary=…, source=…)`` on a function of the method's parameters alone
  (keyword-only, each with a line in ``Args``), which checks them and returns a
  :class:`~fastlora.merging.forms.tile_rules.Rule`: what is trimmed (``Largest``, ``Between``, ``Random``, ``Ranked``,
  ``Varied``, or nothing), how signs are elected, what the sum is divided by, and how what stays is rescaled. Elements
  are those of ``ΔW_i``; weights enter where the rule says. Adapters whose weight is 0 take no part. It runs on the op
  ``merge_tiles`` (compiled, any size of module), and an adapter of low rank is made from products with thin matrices.

      @tiles.rule(summary="elementwise: the largest ΔWᵢ", source="…")
      def magnitude(*, density: float) -> Rule:
          check_share("magnitude", "density", density)
          return Rule(trim=Largest(density))

* **Any rule in torch.** ``@method(summary=…, source=…, measure=…)`` on ``program(tile, *, …)``: a float64 tile
  ``[k, rows, columns]`` of all ``w_i ΔW_i``, and what ``measure`` found in the module before, to ``[rows, columns]``.
  It runs where the factors are, by torch, and the merged ``ΔW`` of one module at a time is there as a dense matrix.

The driver gives both the parameters ``rank``, ``energy`` and ``min_energy``. A rule on elements makes a matrix of full
rank, of which a low rank keeps a part: below ``min_energy`` of ``Σσ²`` over all modules the merge is refused.
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
from fastlora.engine import shares
from fastlora.engine.checks import LARGEST, require_finite
from fastlora.engine.materialise import is_rounding, materialise
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms import whole_model
from fastlora.merging.forms.frames import Cut
from fastlora.merging.forms.low_rank import LowRank, of_dense, of_tiles
from fastlora.merging.forms.result import ByModule, check_result, merged_adapter, of_modules, require_energy, too_large
from fastlora.merging.forms.tile_rules import Largest, OfModel, Rule, resolved
from fastlora.merging.forms.tile_tasks import task_of
from fastlora.merging.registry import Idle, driven, none_idle
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import TileOutputs, TileRule, TileTask
from fastlora.reference.tiles import tile
from fastlora.runtime.memory import batch_bytes, release
from fastlora.runtime.progress import track

Program = TypeVar("Program", bound=Callable[..., Tensor])
RuleProgram = TypeVar("RuleProgram", bound=Callable[..., Rule])
Decomposed = Callable[[str, Cut], LowRank]
"""What a module's merged matrix is, as far as a cut keeps it."""

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


def rule(*, summary: str, source: str, idle: Idle = none_idle, **facts: str) -> Callable[[RuleProgram], RuleProgram]:
    """Registers ``program(*, …) -> Rule``; :func:`merge_by_rule` runs it."""
    return driven("tiles", merge_by_rule, summary, source, idle=idle, **facts)


def merge_by_rule(
    program: Callable[..., Rule],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    min_energy: float = 0.9,
    **parameters: object,
) -> Adapter:
    """An approximation of low rank of what a rule makes of the elements of all ``ΔW_i``, with its exact error.

    Args:
        program: makes the rule of its parameters.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank of the result; give it or an energy
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank
        min_energy: the least share of Σσ² of all modules that a result may keep, in [0, 1]

    Raises:
        InputError: no cut, both cuts or one out of range; a result that overflows; one that keeps less than
            ``min_energy``.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: for every module the passes of its rule (:mod:`fastlora.ops.merge_tiles`), and four of width ``rank + 8``, or
    a dense decomposition where a side is at most 256 long. Memory of the factors and products alone. A rule of the
    whole model goes through all modules about twenty times before.
    """
    ruled = Ruled(program(**parameters), pool, weights)

    def decomposed(module: str, cut: Cut) -> LowRank:
        return of_tiles(*ruled.of(module), cut)

    return _merge(program.__name__, pool, weights, decomposed, rank, energy, min_energy, parameters, ruled.prepare)


class Ruled:
    """A rule for the modules of a pool: its task and its numbers, of one module at a time."""

    def __init__(self, rule: Rule, pool: Pool, weights: Mapping[str, float]) -> None:
        self.rule, self.pool = rule, pool
        self.chosen = [i for i, n in enumerate(pool.names) if weights[n] != 0.0] or [0]
        self.names = [pool.names[i] for i in self.chosen]
        self.given = [weights[name] for name in self.names]
        self._of_model: dict[str, OfModel] = {}

    def prepare(self) -> None:
        """Looks at the whole model, where the rule has to."""
        if self.rule.is_of_model:
            self._of_model.update(_of_model(self.rule, self.pool, self.chosen, self.given, self.names))

    def of(self, module: str) -> tuple[TileTask, TileRule]:
        """The updates of a module and what becomes of them."""
        task = task_of(self.pool, module, self.chosen, self.given)
        of_model = self._of_model.get(module)
        return task, resolved(self.rule, task, self.given, self.names, module, of_model)


def _of_model(
    rule: Rule, pool: Pool, chosen: Sequence[int], weights: Sequence[float], names: Sequence[str]
) -> dict[str, OfModel]:
    """What a rule of the whole model says of every module."""
    trim = rule.trim
    assert isinstance(trim, Largest)

    def visit(look: Callable[[str, TileTask], whole_model.Found]) -> dict[str, whole_model.Found]:
        def own() -> dict[str, whole_model.Found]:
            seen = {}
            for module in shares.own_of_pool(pool):
                seen[module] = look(module, task_of(pool, module, chosen, weights))
                release(sources(pool.adapters[i].updates[module] for i in pool.present(module)))
            return seen

        seen = shares.each("going through the model", own, pool.adapters)
        return {module: seen[module] for module in pool.modules}

    def majority(module: str, task: TileTask) -> int:
        whole_rule = resolved(rule, task, weights, names, module, found[module])
        return merge_tiles.merge(task, whole_rule, TileOutputs()).majority

    kept = whole_model.counts_kept(visit, len(chosen), trim.density, all_equals=trim.all_equals)
    found = {module: OfModel(counts) for module, counts in kept.items()}
    if rule.zero == "plus" or rule.elect == "none" or sum(visit(majority).values()) >= 0:
        return found
    return {module: OfModel(of.kept, -1) for module, of in found.items()}


def merge(
    program: Callable[..., Tensor],
    measure: Callable[..., object] | None,
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    min_energy: float = 0.9,
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
        min_energy: the least share of Σσ² of all modules that a result may keep, in [0, 1]

    Raises:
        InputError: no cut, both cuts or one out of range; a result that overflows; one that keeps less than
            ``min_energy``.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: for every module ``2·k·r·n·m`` operations each time that its tiles are gone through, and the singular value
    decomposition of a dense ``n×m`` matrix, ``O(n·m·min(n, m))`` operations and four times its size in memory.
    """
    given = [weights[n] for n in pool.names]

    def decomposed(module: str, cut: Cut) -> LowRank:
        return of_dense(merged_matrix(program, measure, module, tiles_of(pool, module, given), parameters))

    return _merge(program.__name__, pool, weights, decomposed, rank, energy, min_energy, parameters)


def _merge(
    name: str,
    pool: Pool,
    weights: Mapping[str, float],
    decomposed: Decomposed,
    rank: int | None,
    energy: float | None,
    min_energy: float,
    parameters: Mapping[str, object],
    prepare: Callable[[], None] = lambda: None,
) -> Adapter:
    """The merged adapter, one module after the other; ``prepare`` is called before, when what was given is checked."""
    if rank is None and energy is None:
        raise InputError(
            f"method {name!r} gives matrices of full rank: give the rank of the result, or the energy to keep"
        )
    check_cut(rank, energy)
    if not 0.0 <= min_energy <= 1.0:
        raise InputError(f"min_energy={min_energy:g} must be at least 0 and at most 1")
    require_finite(pool.adapters)  # no Gram pass here would find NaN
    given = [weights[n] for n in pool.names]
    prepare()

    def merged() -> ByModule:
        found: ByModule = {}
        for module in track(shares.own_of_pool(pool), f"merging by {name}"):
            present = pool.present(module)
            row = [pool.adapters[i].updates[module] for i in present]
            noise = joint_noise(u.noise.scaled(given[i]) for i, u in zip(present, row, strict=True))
            rtol, floor = (torch.tensor([x], dtype=torch.float64) for x in (MIN_RTOL, noise.rounding))
            cut = Cut(rtol, floor, rank, energy)
            whole = decomposed(module, cut)
            if not whole.finite or not whole.square <= LARGEST**2:
                raise too_large(name, module)
            found[module] = _cut(whole, cut, row, noise)
            release(sources(row))
        return found

    updates, squares = of_modules(f"merging by {name}", merged, pool)
    require_energy(name, squares, min_energy, rank)
    used = {"rank": rank, "energy": energy, **parameters}
    return merged_adapter(name, pool, given, updates, used, squares=squares)


def merged_matrix(
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


def _cut(merged: LowRank, cut: Cut, row: Sequence[Update], noise: Noise) -> tuple[Update, float, float]:
    """``ΔW = (U√Σ)(√ΣVᵀ)`` of what is kept of a merged module, and the ``Σσ²`` that is kept and that of all.

    ``row``: updates of the module, for its layout and dtype.
    """
    count = merged.count(cut)
    kept = min(float(merged.sigma[:count].square().sum()), merged.square)
    if not count:
        return with_rank_zero(row[0]), kept, merged.square
    dtype = torch.float64 if torch.float64 in {d for u in row for d in u.dtypes()} else torch.float32
    B, A = (x.to(dtype).contiguous() for x in merged.cut_to(count))
    return Update(Factor.of("B", B), Factor.of("A", A), 1.0, row[0].layout, noise), kept, merged.square
