"""Gram blocks of a pool's factors, read once: those of a chain and those of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.core.factors import SIDES, Side
from fastlora.core.updates import Update, factor, sides, sources, unscaled_floor
from fastlora.engine.checks import check_diagonal
from fastlora.engine.contracts import PoolView
from fastlora.engine.gram import GramPass, gram_blocks
from fastlora.engine.schedule import Group, chunks
from fastlora.ops.gram import blocks_of
from fastlora.runtime.memory import release
from fastlora.runtime.progress import track


@dataclass(frozen=True, slots=True, eq=False)
class PairBlocks:
    """Gram blocks of all pairs, for modules that the same adapters have at the same ranks.

    ``members``: positions in the pool. ``left``, ``right``: float64 ``[g, k, k, r, r]``, both triangles, of the ``B``
    and the ``A`` factors, padded with zeros. ``scaling [g, k]``: the ``s_i`` of ``ΔW_i = s_i B_i A_i``.
    """

    modules: list[str]
    members: tuple[int, ...]
    updates: list[list[Update]]  # [g][k]
    left: Tensor
    right: Tensor
    scaling: Tensor

    def inner(self) -> Tensor:
        """``⟨ΔW_i, ΔW_j⟩``, MATH (13): ``[g, k, k]``."""
        products = (self.left * self.right).sum((-1, -2))
        return products * self.scaling[:, :, None] * self.scaling[:, None]


def pair_blocks(pool: PoolView, label: str = "inner products") -> Iterator[PairBlocks]:
    """:class:`PairBlocks` of every module of a pool, some modules at a time."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for module in pool.modules:
        members = tuple(pool.present(module))
        ranks = tuple(pool.adapters[i].updates[module].rank for i in members)
        groups.setdefault((members, ranks), []).append(module)
    work = []
    for (members, ranks), modules in groups.items():
        k, r = len(members), max(1, *ranks)
        for part in chunks(len(modules), 4 * 8 * k * k * r * r):
            work.append((members, r, [modules[i] for i in part]))
    adapters = pool.adapters
    for members, r, names in track(work, label):
        rows = [[adapters[i].updates[m] for i in members] for m in names]
        left, right = (_full(pool, names, members, rows, side, r) for side in SIDES)
        scaling = torch.tensor([[u.scaling for u in row] for row in rows], dtype=torch.float64)
        release(sources(u for row in rows for u in row))
        yield PairBlocks(names, members, rows, left, right, scaling)


def _full(
    pool: PoolView, modules: list[str], members: tuple[int, ...], rows: list[list[Update]], side: Side, r: int
) -> Tensor:
    """Both triangles of one side's blocks: ``[g, k, k, r, r]``."""
    k = len(members)
    blocks = gram_blocks([[factor(u, side) for u in row] for row in rows], r, blocks_of("pairs", k))
    check_diagonal([pool.names[i] for i in members], modules, blocks, side)
    blocks = blocks.cpu()  # also of factors on a device: the methods on all pairs do small things one by one
    upper = torch.ones(k, k, dtype=torch.bool).triu()
    return torch.where(upper[:, :, None, None], blocks, blocks.transpose(1, 2).mT)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Gram blocks of some modules of one group: ``projected [g, k, k, r, r]``, ``other [g, k, r, r]``.

    In blocks of pairs a module is there once for every pair; ``names`` are the adapters of each row.
    """

    modules: list[str]
    names: list[tuple[str, ...]]
    updates: list[list[Update]]
    projected: Tensor
    other: Tensor
    floor: Tensor  # [g, k], in units of the unscaled products
    group: Group


def read_blocks(pool: PoolView, group: Group, modules: list[str], side: str, kind: str) -> Blocks:
    """One pass over both sides' factors of some modules of a group."""
    projected_side, other_side = sides(side)
    names = tuple(pool.names[i] for i in group.members)
    updates = [[pool.adapters[i].updates[m] for i in group.members] for m in modules]
    k, r = len(names), max(1, *group.ranks)
    grams = GramPass()
    projected = grams.blocks([[factor(u, projected_side) for u in row] for row in updates], r, blocks_of(kind, k))
    other = grams.diagonal([[factor(u, other_side) for u in row] for row in updates], r)
    grams.run()
    check_diagonal(names, modules, projected, projected_side)
    check_diagonal(names, modules, other, other_side)
    release(sources(u for row in updates for u in row))
    floor = torch.tensor([[unscaled_floor(u) for u in row] for row in updates], dtype=torch.float64)
    floor = floor.to(projected.device)
    return Blocks(modules, [names] * len(modules), updates, projected, other, floor, group)
