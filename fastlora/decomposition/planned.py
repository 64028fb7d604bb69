"""What a plan prepares: small matrices of its modules, memory of its results, and the launches that fill them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.core.updates import factor, sides
from fastlora.decomposition.devec import ModuleResult, Settings, module_results
from fastlora.decomposition.part_updates import combination, unique_factor
from fastlora.engine.blocks import ask_chain_blocks, require_finite_blocks
from fastlora.engine.buffers import Shape, room
from fastlora.engine.checks import raise_for_info
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import GroupPart
from fastlora.ops import dispatch
from fastlora.ops.chain import Chain
from fastlora.ops.chain import results as chain_results
from fastlora.ops.coefficients import PartCoefficients
from fastlora.ops.dispatch import Launches, prepared
from fastlora.ops.passes import CombineJob


class PlannedPart:
    """The modules of one group: their small matrices, and the launches that fill them from the blocks of ``grams``."""

    def __init__(self, part: GroupPart, settings: Settings, grams: GramPass) -> None:
        self.modules, self.names, self.settings = part.modules, part.names, settings
        self.is_left = settings.side == "left"
        self.blocks = ask_chain_blocks(grams, part, settings.side, settings.blocks_kind)
        self.chain = Chain(*(t.zero_() for t in chain_results(self.blocks.projected, settings.chain)))
        g, k, r, w = self.chain.basis.shape
        self.movers = settings.movers(k)
        device = self.blocks.projected.device

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # As terms of a sum coefficients have contiguous rows: [r, q] on the B side, [q, r] on the A side.
        removal, mixing = new(g, k, self.movers, r, r), new(g, k, w, r) if self.is_left else new(g, k, r, w).mT
        removal = removal if self.is_left else removal.mT
        self.small = PartCoefficients(new(g, k, w, r), new(g, k), new(g, k), removal, mixing)
        self.basis = self.chain.basis if self.is_left else new(g, k, w, r)  # as coefficients of the projected side
        scaling = torch.tensor([[u.scaling for u in row] for row in self.blocks.updates], dtype=torch.float64)
        scaling = scaling.to(device)
        # On the left the scaling is put into the unique part; on the right it stays beside it.
        strength = scaling if self.is_left else torch.ones_like(scaling)
        self._chain_launches = self._prepared_chain()
        blocks = self.blocks
        self._coefficients_launches = prepared(
            "coefficients", blocks.projected, blocks.other, self.chain.basis, scaling, strength, self.small
        )

    def _prepared_chain(self) -> Launches:
        blocks = self.blocks
        arguments = blocks.projected, blocks.other, blocks.floor, *self.settings.cuts(blocks.group.rtol)
        kernel = dispatch.resolve("chain", *arguments)
        if kernel.prepare is None:
            return _CopiedChain(arguments, self.chain)
        launches: Launches = kernel.prepare(*arguments, self.chain)
        return launches

    @property
    def steps(self) -> dict[str, Launches]:
        """What :meth:`run` starts, by its op: for measuring each alone."""
        return {"chain": self._chain_launches, "coefficients": self._coefficients_launches}

    def run(self) -> None:
        """Fills the small matrices from the Gram blocks."""
        self._chain_launches.run()
        if not self.is_left:
            self.basis.copy_(self.chain.basis.mT)
        self._coefficients_launches.run()

    def combine_jobs(self, memory: PlanMemory) -> list[CombineJob]:
        """Two jobs a module: ``Z`` and the unique parts, which are of the projected side; the shared part's other
        side, which is nothing where nothing is shared."""
        jobs = []
        projected_side, other_side = sides(self.settings.side)
        for g, (module, row) in enumerate(zip(self.modules, self.blocks.updates, strict=True)):
            projected, others = ([factor(u, side) for u in row] for side in (projected_side, other_side))
            Z, mixed = memory.shared[module]
            wanted = [WantedFactor(self._basis(g, projected), Z.dtype, Z)]
            for i, name in enumerate(self.names):
                if row[i].rank:
                    unique = self._unique(g, i, projected, row[i].scaling if self.is_left else 1.0)
                    wanted.append(WantedFactor(unique, Z.dtype, memory.unique[name][module]))
            mixing = [self._turned(self.small.mixing[g, i, :, : x.rank]) for i, x in enumerate(others)]
            mixture = WantedFactor(combination(others, mixing), Z.dtype, mixed, present=self.chain.shared[g])
            jobs += [combine_job(wanted), combine_job([mixture])]
        return jobs

    def _basis(self, g: int, projected: Sequence[Factor]) -> Factor:
        """``Z`` of a module, as wide as the chain's basis."""
        movers = projected[: self.movers]
        basis = [self.basis[g, j] for j in range(self.movers)]
        return combination(
            movers, [C[: x.rank] if self.is_left else C[:, : x.rank] for C, x in zip(basis, movers, strict=True)]
        )

    def _unique(self, g: int, i: int, projected: Sequence[Factor], scale: float) -> Factor:
        """The unique part of member ``i`` in a module; ``scale``: what the removals hold as their strength."""
        movers, start = projected[: self.movers], projected[i]
        removals = [self._turned(self.small.removal[g, i, j, : x.rank, : start.rank]) for j, x in enumerate(movers)]
        return unique_factor(start.scaled(scale), movers, removals)

    def _turned(self, small: Tensor) -> Tensor:
        """A removal ``[r_j, r_i]`` or a mixing coefficient ``[w, r_i]`` as the term of a sum."""
        return small if self.is_left else small.mT

    def results(self) -> list[ModuleResult]:
        """What the last run found, module by module; waits for the device."""
        require_finite_blocks(self.blocks, self.settings.side)
        raise_for_info(self.modules, self.chain.info)
        return module_results(self.blocks, self.chain, self.movers, self.small.H, self.small.norms, self.small.shared)


@dataclass(frozen=True, slots=True)
class _CopiedChain:
    """The chain of a backend that makes its own results."""

    arguments: tuple[Any, ...]
    out: Chain

    def run(self) -> None:
        for tensor, result in zip(self.out, dispatch.run("chain", *self.arguments), strict=True):
            tensor.copy_(result)


@dataclass(frozen=True, slots=True, eq=False)
class PlanMemory:
    """Where the results of a plan go.

    ``unique {adapter: {module: projected side}}``, without modules of rank 0. ``shared {module: (Z, other side)}``, as
    many directions as the chain can give, with zeros behind those that are shared.
    """

    unique: dict[str, dict[str, Tensor]]
    shared: dict[str, tuple[Tensor, Tensor]]

    @staticmethod
    def of(parts: Sequence[PlannedPart], names: Sequence[str], dtype: torch.dtype, device: torch.device) -> PlanMemory:
        """One buffer for the unique parts of each adapter ``names``, and one for the shared part."""
        unique: dict[str, dict[str, Shape]] = {n: {} for n in names}
        shared: dict[str, tuple[Shape, Shape]] = {}
        for part in parts:
            w = part.chain.basis.shape[-1]
            for module, row in zip(part.modules, part.blocks.updates, strict=True):
                n, m = row[0].shape
                shared[module] = ((n, w), (w, m)) if part.is_left else ((w, m), (n, w))
                for name, update in zip(part.names, row, strict=True):
                    if update.rank:
                        unique[name][module] = (n, update.rank) if part.is_left else (update.rank, m)
        buffers = {
            name: dict(zip(shapes, room(shapes.values(), dtype, device), strict=True))
            for name, shapes in unique.items()
        }
        both = room([shape for pair in shared.values() for shape in pair], dtype, device)
        return PlanMemory(buffers, dict(zip(shared, zip(both[::2], both[1::2], strict=True), strict=True)))
