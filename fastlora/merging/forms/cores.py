"""The form of methods that are functions of cores: ``ΔW_i = Q_B M_i Q_Aᵀ`` with orthonormal frames ``Q_B``, ``Q_A``.

Every rule that commutes with rotations of rows and columns is a small dense program on the ``M_i [R, R]``, where ``R``
is the sum of the ranks: the same program on the dense ``ΔW_i`` would give ``Q_B core Q_Aᵀ``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import MIN_RTOL, Update
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.schedule import split_to_fit
from fastlora.engine.spectrum import check_cut
from fastlora.errors import InputError
from fastlora.merging.forms.frames import Cut, Frames
from fastlora.merging.forms.result import check_result, largest_rank, merged_adapter
from fastlora.merging.registry import driven

Program = TypeVar("Program", bound=Callable[..., Tensor])


def method(*, summary: str, source: str, **facts: str) -> Callable[[Program], Program]:
    """Registers ``program(cores, *, …)`` or ``program(cores, cut, *, …)``, which :func:`merge` runs."""
    return driven("cores", merge, summary, source, **facts)


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
            A program that takes a second argument ``cut`` (:class:`Cut`) cuts to the rank or energy itself, before what
            it does; else its result is cut.
        pool: the adapters.
        weights: of every adapter, by name.
        rank: rank of the result; by default the largest rank of the pool
        energy: share of Σσ² that every module keeps, in (0, 1], instead of a rank

    Raises:
        InputError: both cuts or one out of range; a sum or a result that overflows.
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.

    Cost: two passes over the factors, three eigendecompositions of ``R×R`` matrices a module beside the program, and
    ``8·(k + 8)·R²`` bytes for every module that is computed at once. A direction whose share of a factor is ``ε`` of
    the largest is orthonormal to ``1e-16/ε²``.
    """
    if rank is None and energy is None:
        rank = largest_rank(pool)
    check_cut(rank, energy)
    name, given = program.__name__, [weights[n] for n in pool.names]
    updates: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}
    cuts_itself = "cut" in inspect.signature(program).parameters
    for blocks in read_pair_blocks(pool, f"cores of {name}"):
        group = Frames.of(blocks)
        R = group.left.shape[1]
        for part in split_to_fit([8 * (len(pool) + 8) * R * R] * len(blocks.modules)):
            frames = group.part(part)
            scales = frames.scales(given)
            cores = frames.cores(scales, len(pool))
            if not bool(cores.isfinite().all()):
                raise InputError(f"the weighted updates overflow: lower the weights {given}")
            cut = frames.cut(given, rank, energy, significant=cuts_itself)
            core = program(cores, cut, **parameters) if cuts_itself else program(cores, **parameters)
            check_result(name, frames.blocks.modules, core, (len(part), R, R))
            last = _rounding(cut) if cuts_itself else cut
            cut_updates = frames.updates(core, frames.right_of(core), last, frames.noises(given))
            for module, (update, kept, total) in cut_updates.items():
                updates[module], squares[module] = update, (kept, total)
    used = {"rank": rank, "energy": energy, **parameters}
    return merged_adapter(name, pool, given, updates, used, squares=None if cuts_itself else squares)


def _rounding(cut: Cut) -> Cut:
    """The cut of a result that was cut before: what is left beside it is rounding."""
    return Cut(torch.full_like(cut.rtol, MIN_RTOL), torch.zeros_like(cut.floor))
