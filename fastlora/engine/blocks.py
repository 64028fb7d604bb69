"""Gram blocks of a pool's factors: those of a chain and those of all pairs.

What is called ``read_…`` reads every factor once, except for the blocks that the Gram cache in use has
(:mod:`fastlora.engine.gram_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlora.core.factors import SIDES, Side
from fastlora.core.updates import NO_NOISE, Update, factor, sides, sources, unscaled
from fastlora.engine.checks import check_diagonal
from fastlora.engine.contracts import PoolView
from fastlora.engine.gram import GramPass, read_gram
from fastlora.engine.schedule import PART_BYTES, Group, GroupPart, pair_parts, parts
from fastlora.engine.stream import current
from fastlora.ops.gram import blocks_of
from fastlora.runtime.memory import is_bounded, release

# Matrices r×r that are in memory for one pair of one module: its Gram blocks, what is made of them, and copies.
MATRICES_OF_PAIR = 32


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


def read_pair_blocks(
    pool: PoolView,
    label: str = "inner products",
    *,
    matrices: float = 4,
    most: int = PART_BYTES,
    shared: bool = False,
) -> Iterator[PairBlocks]:
    """:class:`PairBlocks` of every module of a pool, some modules at a time, or from the Gram cache in use.

    ``matrices``, ``most``, ``shared``: as :func:`fastlora.engine.schedule.parts` has them.
    """
    for part in parts(pool, label, matrices=matrices, most=most, stream=current(), shared=shared):
        there = part.updates()
        left, right = (_read_both_triangles(part, there, side) for side in SIDES)
        # What is made of the blocks combines the factors of the pool, also where a stream read copies of them.
        updates = GroupPart(part.group, part.modules, pool).updates()
        scaling = torch.tensor([[u.scaling for u in row] for row in updates], dtype=torch.float64)
        release(sources(u for row in updates for u in row))
        yield PairBlocks(part.modules, part.group.members, updates, left, right, scaling)


def _read_both_triangles(part: GroupPart, updates: list[list[Update]], side: Side) -> Tensor:
    """One side's blocks, through the Gram cache in use: ``[g, k, k, r, r]``."""
    k = len(part.group.members)
    blocks = read_gram([[factor(u, side) for u in row] for row in updates], part.group.rank, blocks_of("pairs", k))
    check_diagonal(part.names, part.modules, blocks, side)
    blocks = blocks.cpu()  # also of factors on a device: the methods on all pairs do small things one by one
    upper = torch.ones(k, k, dtype=torch.bool).triu()
    return torch.where(upper[:, :, None, None], blocks, blocks.transpose(1, 2).mT)


@dataclass(frozen=True, slots=True, eq=False)
class ChainBlocks:
    """What a chain is computed from, for some modules of one group: Gram blocks of the projected side
    ``projected [g, k, k, r, r]``, and of the other side those on the diagonal, ``other [g, k, r, r]``.

    ``floor [g, k]``: noise floors, in units of the unscaled products. ``names``: the adapters of each row, since blocks
    of pairs have a module once for every pair.
    """

    modules: list[str]
    names: list[tuple[str, ...]]
    updates: list[list[Update]]  # [g][k]
    projected: Tensor
    other: Tensor
    floor: Tensor
    group: Group

    def pairs(self) -> Iterator[ChainBlocks]:
        """The blocks of every two of the adapters, many pairs at once: those of the same ranks and noise floors, at
        their own padded size, so that results do not depend on the rest of the pool."""
        for of_two, pairs in pair_parts(self.group, MATRICES_OF_PAIR * 8 * len(self.modules)):
            r = of_two.rank
            index = torch.tensor(pairs, device=self.projected.device)  # [p, 2]
            rows = [(g, pair) for g in range(len(self.modules)) for pair in pairs]
            yield ChainBlocks(
                [self.modules[g] for g, _ in rows],
                [(self.names[g][i], self.names[g][j]) for g, (i, j) in rows],
                [[self.updates[g][i], self.updates[g][j]] for g, (i, j) in rows],
                self.projected[:, index[:, :, None], index[:, None]][..., :r, :r].flatten(0, 1).contiguous(),
                self.other[:, index][..., :r, :r].flatten(0, 1).contiguous(),
                self.floor[:, index].flatten(0, 1).contiguous(),
                of_two,
            )


def ask_chain_blocks(grams: GramPass, part: GroupPart, side: str, kind: str, *, exact: bool = False) -> ChainBlocks:
    """The blocks of a part, which are there once ``grams`` ran; nothing is read here.

    ``side``: ``"left"`` projects on the ``B`` side. ``kind``: the blocks of that side, ``"chain"`` or ``"pairs"``.
    ``exact``: the floors are those of the arithmetic, and not of what was significant in what updates came from.
    """
    projected_side, other_side = sides(side)
    updates = part.updates()
    r, pairs = part.group.rank, blocks_of(kind, len(part.group.members))
    factors = {"B": [[u.B for u in row] for row in updates], "A": [[u.A for u in row] for row in updates]}
    projected = grams.blocks(factors[projected_side], r, pairs)
    other = grams.diagonal(factors[other_side], r)
    floors = [
        [
            0.0 if u.noise is NO_NOISE and u.scaling else unscaled(u.noise.rounding if exact else u.noise.floor, u)
            for u in row
        ]
        for row in updates
    ]
    floor = torch.from_numpy(np.array(floors, dtype=np.float64))  # torch.tensor takes ten times as long
    names = [part.names] * len(part.modules)
    return ChainBlocks(part.modules, names, updates, projected, other, floor.to(projected.device), part.group)


def read_chain_blocks(part: GroupPart, side: str, kind: str, *, exact: bool = False) -> ChainBlocks:
    """:func:`ask_chain_blocks`, read in one pass over both sides' factors or taken from the Gram cache in use, and
    checked by :func:`require_finite_blocks`."""
    grams = GramPass()
    blocks = ask_chain_blocks(grams, part, side, kind, exact=exact)
    read_asked(grams, blocks)
    require_finite_blocks(blocks, side)
    return blocks


def read_asked(grams: GramPass, blocks: ChainBlocks) -> None:
    """Reads what was asked for, and gives back the factors where memory is bounded."""
    grams.run()
    if is_bounded():
        release(sources(u for row in blocks.updates for u in row))


def require_finite_blocks(blocks: ChainBlocks, side: str) -> None:
    """Raises for the first factor that holds NaN or Inf, by adapter and module; waits for a device."""
    projected_side, other_side = sides(side)
    check_diagonal(blocks.names[0], blocks.modules, blocks.projected, projected_side)
    check_diagonal(blocks.names[0], blocks.modules, blocks.other, other_side)
