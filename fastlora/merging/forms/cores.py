"""The form of methods that are functions of cores: ``ΔW_i = Q_B M_i Q_Aᵀ`` with orthonormal frames ``Q_B``, ``Q_A``.

Every rule that commutes with rotations of rows and columns is a small dense program on the ``M_i [R, R]``, where ``R``
is the sum of the ranks: the same program on the dense ``ΔW_i`` would give ``Q_B core Q_Aᵀ``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import MIN_RTOL
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.checks import LARGEST
from fastlora.engine.schedule import split_to_fit
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms.frames import Cut, Frames
from fastlora.merging.forms.result import ByModule, check_result, largest_rank, merged_adapter, of_modules
from fastlora.merging.registry import Idle, driven, none_idle

Program = TypeVar("Program", bound=Callable[..., Tensor])

# Matrices R×R of every adapter that a program has at a time: its core, and what is made of it. One that has sides
# instead has some for all adapters together.
CORES, SIDES = 5, 16
FRAMES = 12  # of all adapters together, while their frames are found
# What they take of memory together, for each thread. An allocator hands out the pages of small parts again, and they
# stay in the processor's caches. Large ones come from the system anew each time, and that takes longer than arithmetic.
PART_BYTES = 24 * 2**20


def method(
    *, summary: str, source: str, whole: bool = False, idle: Idle = none_idle, **facts: str
) -> Callable[[Program], Program]:
    """Registers ``program(cores, *, …)``, which :func:`merge` runs, or :func:`merge_whole` if ``whole``."""
    if whole:
        return driven("cores", merge_whole, summary, source, idle=idle, **{"rank": "≤ Σrᵢ, or cut", **facts})
    return driven("cores", merge, summary, source, idle=idle, **facts)


def merge(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: object,
) -> Adapter:
    """The merge whose core, in every module, is ``program`` of the cores of all ``w_i ΔW_i``.

    Args:
        program: takes float64 ``cores [g, k, R, R]`` of ``g`` modules and the ``k`` adapters of the pool, and returns
            the merged ``[g, R, R]``, which should scale as they do. An adapter that lacks a module has a core of zeros.
            It gets more by the names of its other arguments, or something else by that of the first: :class:`Given`.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank of the result; by default the largest rank of the pool
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank

    Raises:
        InputError: both cuts or one out of range; a sum or a result that overflows.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: two passes over the factors, three eigendecompositions of ``R×R`` matrices a module beside the program, and
    ``8·(5k + 8)·R²`` bytes for every module that is computed at once. A direction whose share of a factor is ``ε`` of
    the largest is orthonormal to ``1e-16/ε²``.
    """
    if rank is None and energy is None:
        rank = largest_rank(pool)
    check_cut(rank, energy)
    return _merge(program, pool, weights, rank, energy, parameters)


def merge_whole(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: object,
) -> Adapter:
    """:func:`merge` for rules that are the worse for a cut: without one the result has all that the program gives it.

    Args:
        program: as that of :func:`merge`.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank to cut the result to; by default nothing is cut, and the rank is at most Σrᵢ
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank
    """
    if rank is not None or energy is not None:
        check_cut(rank, energy)
    return _merge(program, pool, weights, rank, energy, parameters)


def merge_to_rank(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    **parameters: object,
) -> Adapter:
    """:func:`merge` for programs that need a rank.

    Args:
        program: as that of :func:`merge`.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank of the result; by default the largest rank of the pool
    """
    return merge(program, pool, weights, rank=rank, energy=None, **parameters)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a program may ask for by the name of an argument, for some modules.

    ``cut``: counts the singular values that are significant and within the rank or the energy. A program that takes it
    cuts by itself, before what it does; the result of every other is cut. ``noise``: counts those that are significant.
    ``nulls``: counts those that are no rounding of the arithmetic, where stored numbers are exact.
    ``sides``: ``(L [g, k, R, r], R [g, k, R, r])`` with ``M_i = L_i R_iᵀ``; a program whose first argument this is gets
    no cores, and none are formed. ``stacks``: the stacked ``B`` and ``A`` as
    they are stored, in the same frames. ``weights``: float64 ``[k]``. ``keys``: the names of the adapters and of the
    modules.
    """

    names: list[str]
    frames: Frames
    scales: Tensor
    weights: list[float]
    rank: int | None
    energy: float | None

    def of(self, asked: Sequence[str]) -> list[object]:
        """The values of arguments: the first are the cores, unless it is ``sides``."""
        first = self.sides() if asked[0] == "sides" else self.cores()
        return [first, *(self.named(name) for name in asked[1:])]

    def cores(self) -> Tensor:
        """The ``M_i``, ``[g, k, R, R]``."""
        cores = self.frames.cores(self.scales, len(self.weights))
        self._check(cores)
        return cores

    def sides(self) -> tuple[Tensor, Tensor]:
        """``(L [g, k, R, r], R [g, k, R, r])`` with ``M_i = L_i R_iᵀ``."""
        sides = self.frames.sides(self.scales, len(self.weights))
        self._check(sides[0])
        return sides

    def _check(self, values: Tensor) -> None:
        if values.numel() and not all(abs(x) <= LARGEST for x in values.aminmax()):  # their squares are needed
            raise InputError(f"the weighted updates overflow: lower the weights {self.weights}")

    def named(self, name: str) -> object:
        """The value of the argument ``name``, which is not the first."""
        if name == "cut":
            return self.frames.cut(self.weights, self.rank, self.energy, significant=True)
        if name == "noise":
            return self.frames.cut(self.weights, None, None, significant=True)
        if name == "nulls":
            return self.frames.cut(self.weights, None, None)
        if name == "sides":
            return self.sides()
        if name == "stacks":
            return self.frames.stacks(self.scales)
        if name == "weights":
            return torch.tensor(self.weights, dtype=torch.float64)
        if name == "keys":
            return self.names, self.frames.blocks.modules
        raise TypeError(f"a program on cores cannot have {name!r}: cut, noise, nulls, sides, stacks, weights or keys")


def _asked(program: Callable[..., Tensor]) -> list[str]:
    """The arguments of a program that are not parameters of the method."""
    parameters = inspect.signature(program).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _merge(
    program: Callable[..., Tensor],
    pool: Pool,
    weights: Mapping[str, float],
    rank: int | None,
    energy: float | None,
    parameters: Mapping[str, object],
) -> Adapter:
    name, given = program.__name__, [weights[n] for n in pool.names]
    asked, most = _asked(program), PART_BYTES * torch.get_num_threads()

    def merged() -> ByModule:
        found: ByModule = {}
        for blocks in read_pair_blocks(pool, f"cores of {name}", matrices=FRAMES, most=most, shared=True):
            group = Frames.of(blocks)
            R = group.left.shape[1]
            matrices = SIDES if asked[0] == "sides" else CORES * len(pool)
            for part in split_to_fit([8 * (matrices + 8) * R * R] * len(blocks.modules), most):
                frames = group.part(part)
                scales = frames.scales(given)
                more = Given(pool.names, frames, scales, given, rank, energy)
                core = program(*more.of(asked), **parameters)
                check_result(name, frames.blocks.modules, core, (len(part), R, R))
                cut = frames.cut(given, rank, energy, significant="cut" in asked)
                last = _rounding(cut) if "cut" in asked else cut
                found |= frames.updates(core, frames.right_of(core), last, frames.noises(given))
        return found

    updates, squares = of_modules(f"merging by {name}", merged, pool)
    used = {"rank": rank, "energy": energy, **parameters}
    was_cut = (rank is not None or energy is not None) and "cut" not in asked
    return merged_adapter(name, pool, given, updates, used, squares=squares if was_cut else None)


def _rounding(cut: Cut) -> Cut:
    """The cut of a result that was cut before: what is left beside it is rounding."""
    return Cut(torch.full_like(cut.rtol, MIN_RTOL), torch.zeros_like(cut.floor))
