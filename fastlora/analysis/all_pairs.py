"""Similarities of all pairs of a large pool, module by module, by tiles of stacked factors.

Memory beside the factors: the results ``[k, k]``, and the stacks of one module, of two blocks of adapters where they
are many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.core.updates import Update
from fastlora.engine.contracts import PoolView
from fastlora.engine.schedule import GroupPart, parts
from fastlora.engine.stacks import Frames, Stacked, blocks_of_adapters, frames, stacked
from fastlora.engine.stream import current
from fastlora.ops.similarity import similarity

# Float64 [r, r] that one adapter takes in one module: Gram blocks, frames, and what the solvers take.
MATRICES_OF_ADAPTER = 16

# What is asked of kernels is told to them in Python objects, which take more memory than small factors.
MODULES_AT_ONCE = 1


class ModulePairs(NamedTuple):
    """Of one module, for the ``members`` of the pool that have it: ``inner [k, k]`` is ``⟨ΔW_i, ΔW_j⟩``, ``subspace [k,
    k]`` is ``‖U_iᵀU_j‖²/min(q_i, q_j)`` (NaN beside an update of zero), ``norms [k]`` are ``‖ΔW_i‖``. Float64."""

    module: str
    members: tuple[int, ...]
    inner: Tensor
    subspace: Tensor
    norms: Tensor


def all_pairs(pool: PoolView) -> Iterator[ModulePairs]:
    """Every module of a pool, also those that a single adapter has; of those that are this rank's, where several work
    together. Two reads of the factors."""
    for part in _parts(pool):
        of_part = frames(part)
        for g, (module, updates) in enumerate(zip(part.modules, part.updates(), strict=True)):
            yield _compared(module, part.group.members, updates, Frames(*(x[g] for x in of_part)))


def _parts(pool: PoolView) -> Iterator[GroupPart]:
    most = max((len(pool.present(module)) for module in pool.modules), default=1)
    for part in parts(pool, "comparing", least=1, matrices=MATRICES_OF_ADAPTER / most, stream=current(), shared=True):
        for first in range(0, len(part.modules), MODULES_AT_ONCE):
            yield replace(part, modules=part.modules[first : first + MODULES_AT_ONCE])


def _compared(module: str, members: tuple[int, ...], updates: list[Update], own: Frames) -> ModulePairs:
    """``own``: the frames of this module alone."""
    ranks = own.ranks.tolist()
    blocks = blocks_of_adapters(ranks, sum(updates[0].shape))
    if len(blocks) == 1:
        inner, shared = (x.cpu() for x in similarity(*stacked(updates, own.T, own.C, ranks), own.kept))
    else:
        inner, shared = _by_blocks(updates, own, ranks, blocks)
    inner *= own.sizes[:, None] * own.sizes
    shared /= torch.minimum(own.kept[:, None], own.kept)
    return ModulePairs(module, members, inner, shared, own.norms)


def _by_blocks(updates: list[Update], own: Frames, ranks: list[int], blocks: list[range]) -> tuple[Tensor, Tensor]:
    """The results of :func:`similarity` for all pairs, two blocks of adapters at a time."""
    inner, shared = (torch.zeros(len(ranks), len(ranks), dtype=torch.float64) for _ in range(2))

    def stack(block: list[int]) -> Stacked:
        index = slice(block[0], block[-1] + 1)
        return stacked([updates[i] for i in block], own.T[index], own.C[index], ranks[index])

    for b, block in enumerate(blocks):
        mine = stack(list(block))
        _put(inner, shared, list(block), similarity(*mine, own.kept[block[0] : block[-1] + 1]))
        for other in blocks[b + 1 :]:
            both, its = [*block, *other], stack(list(other))
            joint = Stacked(
                torch.cat([mine.left, its.left], 1), torch.cat([mine.right, its.right], 1),
                torch.cat([mine.starts, its.starts[1:] + mine.starts[-1]]),
            )  # fmt: skip
            _put(inner, shared, both, similarity(*joint, own.kept[both], split=len(block)), only=len(block))
    return inner, shared


def _put(
    inner: Tensor, shared: Tensor, adapters: list[int], found: tuple[Tensor, Tensor], only: int | None = None
) -> None:
    """Results of some adapters to their places; ``only``: those of that many with the others."""
    index = torch.tensor(adapters)
    for out, results in zip((inner, shared), found, strict=True):
        results = results.cpu()
        if only is None:
            out[index[:, None], index] = results
        else:
            out[index[:only, None], index[only:]] = results[:only, only:]
            out[index[only:, None], index[:only]] = results[only:, :only]
