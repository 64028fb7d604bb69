"""The updates of a plan's results: on its memory, or on the pool's matrices where that memory is too narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor
from fastlora.core.updates import Update, factor, sides
from fastlora.decomposition.devec import ModuleResult, Settings
from fastlora.decomposition.part_updates import LazyUpdates, assembled, first_update
from fastlora.decomposition.planned import PlanMemory, PlannedPart
from fastlora.engine.balance import Range, is_narrow
from fastlora.engine.gram import GramPass

# Of the squared norm of a column: what is left of it is known to that from the small matrices, or is read.
KNOWN = 2.0**-10


class OutsideRange(NamedTuple):
    """The modules whose results lack digits in the memory of a plan: unique parts by adapter, and the shared part."""

    unique: dict[str, set[str]]
    shared: set[str]


def outside_range(parts: Sequence[PlannedPart], memory: PlanMemory, dtype: torch.dtype) -> OutsideRange:
    """What of the last run the memory does not hold; waits for the device.

    Nothing is looked at unless the dtype is float16 or a scaling is extreme. The small matrices tell the sizes of most
    unique parts. The others are read, and what is mixed of the shared parts.
    """
    found = OutsideRange({name: set() for name in memory.unique}, set())
    for part in parts:
        if is_narrow(dtype, (u.scaling for row in part.blocks.updates for u in row)):
            for module, name in _unique_outside(part, memory, Range.of(dtype)):
                found.unique[name].add(module)
            found.shared.update(_shared_outside(part, memory, Range.of(dtype)))
    return found


def _unique_outside(part: PlannedPart, memory: PlanMemory, limits: Range) -> list[tuple[str, str]]:
    """(module, adapter) of unique parts with columns outside the range.

    ``‖X_i − Z H_i‖² = ‖X_i‖² − ‖H_i‖²``, column by column.
    """
    projected_side, _ = sides(part.settings.side)
    length, other_length = _lengths(part)
    blocks = part.blocks
    whole = blocks.projected.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2)  # [g, k, r]
    left, unknown = (whole - part.small.H.square().sum(2)).clamp(min=0), KNOWN * whole
    strength = torch.tensor([[abs(u.scaling) if part.is_left else 1.0 for u in row] for row in blocks.updates])
    scale = strength.to(whole)[..., None] / length**0.5
    least, most = scale * (left - unknown).clamp(min=0).sqrt(), scale * (left + unknown).sqrt()
    other = blocks.other.diagonal(dim1=2, dim2=3).clamp(min=0).div(other_length).sqrt()
    unsure = (~limits.holds_update(least, most, other)).nonzero().tolist()
    unsure = [(g, i) for g, i in unsure if blocks.updates[g][i].rank]
    if not unsure:
        return []
    stored = [memory.unique[part.names[i]][part.modules[g]] for g, i in unsure]
    sizes = _column_sizes([Factor.of(projected_side, x) for x in stored], part.blocks.group.rank)
    at = tuple(torch.tensor(unsure, device=whole.device).mT)
    held = _held(limits, sizes, whole[at] > 0, other[at])
    return [(part.modules[g], part.names[i]) for (g, i), is_held in zip(unsure, held, strict=True) if not is_held]


def _shared_outside(part: PlannedPart, memory: PlanMemory, limits: Range) -> list[str]:
    """Modules whose shared part has columns outside the range; those of ``Z`` have length one."""
    _, other_side = sides(part.settings.side)
    length, _ = _lengths(part)
    counts = part.chain.shared.tolist()
    shared = [(module, count) for module, count in zip(part.modules, counts, strict=True) if count]
    if length**-0.5 < limits.least or not shared:
        return [module for module, _ in shared]
    mixed = [memory.shared[module][1] for module, _ in shared]
    sizes = _column_sizes([Factor.of(other_side, x) for x in mixed], part.chain.basis.shape[-1])
    are_shared = torch.arange(sizes.shape[-1]) < torch.tensor([count for _, count in shared])[:, None]
    held = _held(limits, sizes, are_shared.to(sizes.device), torch.ones_like(sizes))
    return [module for (module, _), is_held in zip(shared, held, strict=True) if not is_held]


def _held(limits: Range, sizes: Tensor, there: Tensor, other: Tensor) -> list[bool]:
    """Whether factors have all the digits that count, of which these ``sizes`` are left in the memory: a step of the
    dtype more or less, but for columns that are not ``there``."""
    least, most = (torch.where(there, sizes + step, 0.0) for step in (-limits.step, limits.step))
    held: list[bool] = limits.holds_update(least, most, other).tolist()
    return held


def _lengths(part: PlannedPart) -> tuple[int, int]:
    """Of the projected side and of the other one."""
    n, m = part.blocks.updates[0][0].shape
    return (n, m) if part.is_left else (m, n)


def _column_sizes(factors: Sequence[Factor], rank: int) -> Tensor:
    """Root mean squares of the columns of ``B``, or rows of ``A``, of some factors of one length: ``[count, rank]``."""
    grams = GramPass()
    squares = grams.diagonal([[x] for x in factors], rank)
    grams.run()
    return squares[:, 0].diagonal(dim1=1, dim2=2).div(factors[0].length).sqrt()


class PlannedUpdates(LazyUpdates):
    """Updates whose computed sides lie in the memory of a plan, where it holds them: the next run overwrites them."""

    def __init__(
        self,
        pool: Pool,
        results: Mapping[str, ModuleResult],
        settings: Settings,
        memory: PlanMemory,
        outside: OutsideRange,
    ) -> None:
        super().__init__(pool, results, settings)
        self._settings, self._memory, self._outside = settings, memory, outside

    def shared(self, name: str | None) -> dict[str, Update]:
        """The shared part by module; that of all (``name=None``) on views ``[n, count]``, ``[count, m]`` of the
        memory."""
        if name is not None:
            return super().shared(name)
        updates = self._on_pool(self._outside.shared).shared(None)
        for module, result in self.results.items():
            if module in self._outside.shared:
                continue
            if result.count and any(self.mixing_weights(result, range(len(result.names)), None)):
                Z, mixed = self._memory.shared[module]
                left, right = (Z, mixed) if self.side == "left" else (mixed, Z)
                B, A = Factor.of("B", left[:, : result.count]), Factor.of("A", right[: result.count])
                updates[module] = Update(B, A, 1.0, first_update(self.pool, module).layout)
        return updates

    def unique(self, name: str) -> dict[str, Update]:
        """The unique part of an adapter by module, its projected side in the memory."""
        outside = self._outside.unique[name]
        updates = self._on_pool(outside).unique(name)
        for module, out in self._memory.unique[name].items():
            if module in outside:
                continue
            update, result = self.pool[name].updates[module], self.results[module]
            side, other_side = sides(self.side)
            projected, other = Factor.of(side, out), factor(update, other_side)
            scaling = 1.0 if self.side == "left" else update.scaling  # on the left it is inside
            noise = result.unique_noise(result.names.index(name), update)
            updates[module] = assembled(update, self.side, projected, other, scaling, noise)
        return updates

    def _on_pool(self, modules: set[str]) -> LazyUpdates:
        """The updates of some modules as sums on the pool's matrices."""
        return LazyUpdates(self.pool, {m: r for m, r in self.results.items() if m in modules}, self._settings)
