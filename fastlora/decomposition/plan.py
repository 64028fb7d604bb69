"""A whole decomposition prepared for running many times: on a device, launches and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.dtypes import widest
from fastlora.core.factors import SIDES, Factor, Side
from fastlora.core.updates import Update, factor, sides, unscaled_floor
from fastlora.decomposition import devec
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult, Settings
from fastlora.decomposition.result import Decomposition
from fastlora.engine import schedule
from fastlora.engine.blocks import Blocks
from fastlora.engine.buffers import refill, room
from fastlora.engine.checks import check_diagonal, raise_for_info
from fastlora.engine.schedule import Group
from fastlora.errors import InputError
from fastlora.ops import dispatch
from fastlora.ops.chain import Chain, check_cuts, width
from fastlora.ops.coefficients import Coefficients
from fastlora.ops.dispatch import Launches, prepared
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm, GramJob


@dataclass(frozen=True, slots=True)
class _CopiedChain:
    """The chain of a backend that makes its own results."""

    arguments: tuple[Any, ...]
    out: Chain

    def run(self) -> None:
        for tensor, found in zip(self.out, dispatch.run("chain", *self.arguments), strict=True):
            tensor.copy_(found)


class _Part:
    """The modules of one group: their small matrices, and the launches that fill them."""

    def __init__(self, pool: Pool, group: Group, modules: list[str], settings: Settings, device: torch.device) -> None:
        self.group, self.modules, self.settings = group, modules, settings
        self.updates = [[pool.adapters[i].updates[m] for i in group.members] for m in modules]
        g, k, r = len(modules), len(group.members), max(1, *group.ranks)
        w = width(settings.chain, k, r)
        self.movers = k if settings.chain == "mean" else 1
        left = settings.side == "left"

        def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.projected, self.other = new(g, k, k, r, r), new(g, k, r, r)
        floor = torch.tensor([[unscaled_floor(u) for u in row] for row in self.updates], dtype=torch.float64)
        scaling = torch.tensor([[u.scaling for u in row] for row in self.updates], dtype=torch.float64)
        self.floor, self.scaling = floor.to(device), scaling.to(device)
        # On the left the scaling is put into the unique part; on the right it stays beside it.
        self.strength = self.scaling if left else torch.ones_like(self.scaling)
        self.chain = Chain(
            new(g, k, r, w),
            new(g, w, dtype=torch.complex128),
            new(g, dtype=torch.int64),
            new(g, k, dtype=torch.int64),
            new(g, k, r),
            new(g, dtype=torch.int32),
        )
        # A-side coefficients are [q, r], B-side ones [r, q], both with contiguous rows.
        removal, mixing = new(g, k, self.movers, r, r), new(g, k, w, r) if left else new(g, k, r, w).mT
        self.small = Coefficients(new(g, k, w, r), new(g, k), new(g, k), removal if left else removal.mT, mixing)
        self.basis = self.chain.basis if left else new(g, k, w, r)  # as a coefficient of the projected side
        self._left = left
        self._chain = self._prepared_chain()
        arguments = (self.projected, self.other, self.chain.basis, self.scaling, self.strength, self.small)
        self._coefficients = prepared("coefficients", *arguments)

    def _prepared_chain(self) -> Launches:
        s = self.settings
        cuts = s.threshold, s.chain, self.group.rtol, s.rank or 0, 1.0 if s.energy is None else s.energy
        arguments = self.projected, self.other, self.floor, *cuts
        kernel = dispatch.resolve("chain", *arguments)
        if kernel.plan is None:
            return _CopiedChain(arguments, self.chain)
        found: Launches = kernel.plan(*arguments, self.chain)
        return found

    def gram_jobs(self) -> list[GramJob]:
        """Blocks of both sides of every module."""
        sides_of = sides(self.settings.side)
        k, r = self.other.shape[1], self.other.shape[-1]
        kind = "pairs" if self.settings.chain == "mean" else "chain"
        pairs = [(i, j, (i * k + j) * r * r) for i, j in blocks_of(kind, k)]
        diagonal = [(i, i, i * r * r) for i in range(k)]
        jobs = []
        for side, places, out in ((sides_of[0], pairs, self.projected), (sides_of[1], diagonal, self.other)):
            size = out[0].numel()
            for m, row in enumerate(self.updates):
                own = [_stored(u, side) for u in row]
                jobs.append(GramJob(own, places, side == "A", out, r, m * size))
        return jobs

    def run(self) -> None:
        self._chain.run()
        if not self._left:
            self.basis.copy_(self.chain.basis.mT)
        self._coefficients.run()

    def combine_jobs(self, g: int, unique: Sequence[Tensor], shared: tuple[Tensor, Tensor]) -> list[CombineJob]:
        """The two jobs of one module: unique parts (of the projected side) and ``Z``; the shared part's other side."""
        projected_side, other_side = sides(self.settings.side)
        Z, mixed = shared
        row, ranks = self.updates[g], self.group.ranks

        def cut(small: Tensor, side: Side, r: int, q: int) -> Tensor:
            """``[r, q]`` or, on the A side, ``[q, r]``."""
            return small[:r, :q] if side == "B" else small[:q, :r]

        w = self.chain.basis.shape[-1]
        basis = [(j, cut(self.basis[g, j], projected_side, ranks[j], w), 0, 1.0) for j in range(self.movers)]
        outputs = [CombineOutput.into(Z, _terms(basis))]
        for i, out in enumerate(unique):
            terms: list[CombineTerm] = [(i, None, 0, row[i].scaling if self._left else 1.0)]
            for j in range(self.movers):
                small = self.small.removal[g, i, j]
                own = small[: ranks[j], : ranks[i]]
                terms.append((j, own if self._left else own.mT, 0, 1.0))
            if ranks[i]:
                outputs.append(CombineOutput.into(out, _terms(terms)))
        mixing: list[CombineTerm] = []
        for i, r in enumerate(ranks):
            small = self.small.mixing[g, i]
            mixing.append((i, small[:, :r] if self._left else small[:, :r].mT, 0, 1.0))
        return [
            CombineJob([_stored(u, projected_side) for u in row], outputs, projected_side == "A"),
            CombineJob(
                [_stored(u, other_side) for u in row], [CombineOutput.into(mixed, _terms(mixing))], other_side == "A"
            ),
        ]

    def results(self, names: Sequence[str]) -> list[ModuleResult]:
        """What was found, module by module; waits for the device."""
        projected_side, other_side = sides(self.settings.side)
        own = tuple(names[i] for i in self.group.members)
        check_diagonal(own, self.modules, self.projected, projected_side)
        check_diagonal(own, self.modules, self.other, other_side)
        raise_for_info(self.modules, self.chain.info)
        blocks = Blocks(
            self.modules, [own] * len(self.modules), self.updates, self.projected, self.other, self.floor, self.group
        )
        return devec.module_results(blocks, self.chain, self.movers, self.small.H, self.small.norms, self.small.shared)


def _terms(terms: Sequence[CombineTerm]) -> list[CombineTerm]:
    """Without those of rank 0, which add nothing."""
    return [t for t in terms if t[1] is None or t[1].numel()]


def _stored(update: Update, side: Side) -> Tensor:
    stored = factor(update, side).stored
    assert stored is not None
    return stored


class DecompositionPlan:
    """:func:`fastlora.decompose` of a pool, prepared: fixed shapes, tables and outputs in memory.

    :meth:`run` reads every factor twice and writes every result once; on a CUDA device it is a handful of launches on
    the current stream, without allocation, synchronisation or a look at the data, so that it can be captured:

        plan = fl.DecompositionPlan(pool.to("cuda"))
        graph = plan.capture()
        plan.fill(other_pool)            # the same modules, ranks, dtypes and scalings; one copy an adapter
        graph.replay()
        plan.decomposition().report; plan.adapters()["shared"].save("shared")

    Args:
        pool: two adapters or more, all on one device.
        threshold, chain, side, rank, energy, rtol: as in :func:`fastlora.decompose` with ``mode="pool"``.
        dtype: of the results, by default the widest of the pool, as when saving.

    Memory: the pool, results of the same size, and ``8·(k² + 4k)·r²`` bytes a module.

    Raises:
        InputError: factors that are no stored matrices (a sum of adapters: save and load it), adapters
            on different devices, parameters out of range.
    """

    def __init__(
        self,
        pool: Pool,
        threshold: float = 0.85,
        *,
        chain: str = "product",
        side: str = "left",
        rank: int | None = None,
        energy: float | None = None,
        rtol: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_cuts(threshold, chain, rtol or 0.0, rank or 0, 1.0 if energy is None else energy)
        if len(pool) < 2:
            raise InputError("decompose: a pool of one adapter has nothing to share; give two adapters or more")
        self.pool = pool
        self.device = pool.device
        self.settings = Settings(float(threshold), chain, side, rank, energy, rtol)
        self.dtype = widest(a.dtype for a in pool.adapters) if dtype is None else dtype
        for adapter in pool.adapters:
            _require_stored(adapter)
        groups = schedule.group_modules(pool, pool.modules, rtol)
        self.parts = [_Part(pool, group, own, self.settings, self.device) for group, own in groups.items()]
        self.unique_parts, self.shared_parts = self._outputs()
        self.gram = prepared("gram_pass", [job for part in self.parts for job in part.gram_jobs()])
        self.combine = prepared("combine_pass", self._combine_jobs())

    def run(self) -> None:
        """Starts the whole decomposition on the current stream."""
        self.gram.run()
        for part in self.parts:
            part.run()
        self.combine.run()

    @property
    def block_bytes(self) -> int:
        """Of the Gram blocks that are written."""
        return sum(8 * len(j.blocks) * j.stride**2 for part in self.parts for j in part.gram_jobs())

    def capture(self) -> torch.cuda.CUDAGraph:
        """A CUDA graph of :meth:`run`; replay it after :meth:`fill` for other data.

        Raises :class:`InputError` for a plan that is not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise InputError(f"plan: a CUDA graph needs a pool on a CUDA device, not on {self.device}")
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.run()  # what is loaded or compiled at first use must not be captured
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graph

    def fill(self, pool: Pool) -> None:
        """Copies the factors of another ``pool`` into this plan's, on the current stream.

        Raises :class:`InputError` unless adapters, modules, shapes, dtypes and scalings are those of the plan.
        """
        if len(pool) != len(self.pool):
            raise InputError(f"plan: it was made for {len(self.pool)} adapters, not for {len(pool)}")
        for mine, other in zip(self.pool.adapters, pool.adapters, strict=True):
            if list(mine.updates) != list(other.updates):
                raise InputError(f"plan: adapters {mine.name!r} and {other.name!r} have different modules")
            for module, update in mine.updates.items():
                _require_alike(module, update, other.updates[module])
        for mine, other in zip(self.pool.adapters, pool.adapters, strict=True):
            refill(mine, other)

    def components(self) -> Components:
        """Coefficients, spectra and norms of the last run; waits for the device."""
        found = [r for part in self.parts for r in part.results(self.pool.names)]
        results = {r.module: r for r in found}
        return Components(self.pool, {m: results[m] for m in self.pool.modules if m in results}, self.settings, "pool")

    def decomposition(self) -> Decomposition:
        """The last run as :func:`fastlora.decompose` returns it, with its report."""
        return Decomposition(self.pool, "pool", whole=self.components())

    def adapters(self) -> dict[str, Adapter]:
        """The results of the last run, ``shared`` and ``unique/<name>``, on the device.

        They lie in the plan's own memory: the next run overwrites them, so save or clone them before."""
        components = self.components()
        shared = components.shared
        updates = dict(shared.updates)
        for module, (Z, mixed) in self.shared_parts.items():
            result = components.results[module]
            if result.count and shared.updates[module].rank:
                left, right = (Z, mixed) if self._left else (mixed, Z)
                own = Factor.of("B", left[:, : result.count]), Factor.of("A", right[: result.count])
                updates[module] = replace(updates[module], B=own[0], A=own[1])
        found = {"shared": replace(shared, updates=updates, dtype=self.dtype)}
        for name in self.pool.names:
            unique = components.unique_of(name)
            updates = dict(unique.updates)
            for module, out in self.unique_parts[name].items():
                update = updates[module]
                if self._left:
                    updates[module] = replace(update, B=Factor.of("B", out), scaling=1.0)
                else:
                    updates[module] = replace(update, A=Factor.of("A", out))
            found[f"unique/{name}"] = replace(unique, updates=updates, dtype=self.dtype)
        return found

    @property
    def _left(self) -> bool:
        return self.settings.side == "left"

    def _outputs(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
        """Room for the unique parts, by adapter and module, and for the shared part: one buffer an adapter."""
        unique: dict[str, dict[str, tuple[int, int]]] = {n: {} for n in self.pool.names}
        shared: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
        for part in self.parts:
            w = part.chain.basis.shape[-1]
            for module, row in zip(part.modules, part.updates, strict=True):
                n, m = row[0].shape
                left, right = (n, w), (w, m)
                shared[module] = (left, right) if self._left else (right, left)
                for i, update in zip(part.group.members, row, strict=True):
                    if update.rank:
                        shape = (n, update.rank) if self._left else (update.rank, m)
                        unique[self.pool.names[i]][module] = shape
        buffers = {
            n: dict(zip(own, room(own.values(), self.dtype, self.device), strict=True)) for n, own in unique.items()
        }
        both = room([s for pair in shared.values() for s in pair], self.dtype, self.device)
        return buffers, dict(zip(shared, zip(both[::2], both[1::2], strict=True), strict=True))

    def _combine_jobs(self) -> list[CombineJob]:
        jobs = []
        for part in self.parts:
            for g, module in enumerate(part.modules):
                names = [self.pool.names[i] for i in part.group.members]
                none = torch.empty(0, 0, dtype=self.dtype, device=self.device)  # of rank 0
                unique = [self.unique_parts[n].get(module, none) for n in names]
                jobs += part.combine_jobs(g, unique, self.shared_parts[module])
        return jobs


def _require_stored(adapter: Adapter) -> None:
    for module, update in adapter.updates.items():
        if update.B.stored is None or update.A.stored is None:
            raise InputError(
                f"plan: {module} of adapter {adapter.name!r} is computed from other matrices; save and load it"
            )


def _require_alike(module: str, mine: Update, other: Update) -> None:
    if mine.scaling != other.scaling:
        raise InputError(
            f"plan: {module} has the scaling {other.scaling:g}, the plan {mine.scaling:g}; make a new plan"
        )
    for side in SIDES:
        target, source = factor(mine, side).stored, factor(other, side).stored
        assert target is not None
        if source is None or source.shape != target.shape or source.dtype != target.dtype:
            what = "a sum of matrices" if source is None else f"{list(source.shape)} {source.dtype}"
            raise InputError(
                f"plan: lora_{side} of {module} is {what}, the plan's {list(target.shape)} {target.dtype}; make a new "
                "plan"
            )
