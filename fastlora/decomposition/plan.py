"""A whole decomposition prepared for running many times: on a device, launches and nothing else."""

from __future__ import annotations

import torch

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.dtypes import widest
from fastlora.core.factors import SIDES
from fastlora.core.updates import Update, factor
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult, Settings
from fastlora.decomposition.planned import PlanMemory, PlannedPart
from fastlora.decomposition.planned_halves import WORTH, InTurn, PlannedHalf, in_halves, run_beside, run_in_turn
from fastlora.decomposition.planned_updates import PlannedUpdates, outside_range
from fastlora.decomposition.result import Decomposition
from fastlora.engine.buffers import refill
from fastlora.engine.gram import GramPass
from fastlora.engine.schedule import rtol_or_default, whole_groups
from fastlora.errors import InputError
from fastlora.ops.chain import check_cuts
from fastlora.ops.dispatch import prepared


class DecompositionPlan:
    """:func:`fastlora.decompose` of a pool, prepared: fixed shapes, tables and outputs in memory.

    :meth:`run` reads every factor twice (some half-precision ones three times) and writes every result once; on a CUDA
    device it is a handful of launches in the order of the current stream, without allocation, synchronisation or a look
    at the data, so that it can be captured:

        plan = fl.DecompositionPlan(pool.to("cuda"))
        graph = plan.capture()
        plan.fill(other_pool)            # the same modules, ranks, dtypes and scalings; one copy an adapter
        graph.replay()
        plan.decomposition().report; plan.adapters()["shared"].save("shared")

    Args:
        pool: two adapters or more, all on one device.
        threshold, chain, side, rank, energy, rtol: as in :func:`fastlora.decompose` with ``mode="pool"``. A threshold
            is a number, and ``weighting`` is refused: those chains have steps on the CPU.
        dtype: of the results, by default the widest of the pool, as when saving.

    Memory: the pool, results of the same size, and ``8·(k² + 4k)·r²`` bytes a module.

    Raises:
        InputError: factors that are no stored matrices (a sum of adapters: save and load it), adapters
            on different devices, parameters out of range.
    """

    def __init__(
        self,
        pool: Pool,
        threshold: float | str = 0.85,
        *,
        chain: str = "product",
        side: str = "left",
        rank: int | None = None,
        energy: float | None = None,
        rtol: float | None = None,
        weighting: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, given in (("threshold", threshold), ("weighting", weighting)):
            if isinstance(given, str):
                raise InputError(
                    f"plan: {name}={given!r} needs decompositions on the CPU, and a plan is launches alone; use "
                    f"fl.decompose(pool, {name}={given!r}, …)"
                )
        threshold = float(threshold)
        check_cuts(threshold, chain, rtol or 0.0, rank or 0, 1.0 if energy is None else energy)
        if len(pool) < 2:
            raise InputError("decompose: a pool of one adapter has nothing to share; give two adapters or more")
        self.pool = pool
        self.device = pool.device
        self.settings = Settings(threshold, chain, side, rank, energy, rtol)
        self.dtype = widest(a.dtype for a in pool.adapters) if dtype is None else dtype
        for adapter in pool.adapters:
            _require_stored(adapter)
        groups = whole_groups(pool, rtol_of=rtol_or_default(rtol), least=2)
        pieces = in_halves(groups, WORTH) if self.device.type == "cuda" else [groups]
        grams = [GramPass() for _ in pieces]
        parts = [[PlannedPart(g, self.settings, own) for g in piece] for piece, own in zip(pieces, grams, strict=True)]
        self.parts = [part for piece in parts for part in piece]
        self._memory = PlanMemory.of(self.parts, pool.names, self.dtype, self.device)
        # As the launches leave them, in the plan's dtype: `adapters` says which of them have all their digits.
        self.unique_parts, self.shared_parts = self._memory.unique, self._memory.shared
        self.block_bytes = sum(8 * len(job.blocks) * job.stride**2 for own in grams for job in own.jobs)
        # What the combine pass makes: two jobs a module, of the projected side and of the other one.
        jobs = [[job for part in piece for job in part.combine_jobs(self._memory)] for piece in parts]
        self.jobs = [job for own in jobs for job in own]
        self.halves = [
            PlannedHalf(own.prepared(), piece, prepared("combine_pass", made))
            for own, piece, made in zip(grams, parts, jobs, strict=True)
        ]
        self.gram = InTurn(tuple([half.gram for half in self.halves]))
        self.combine = InTurn(tuple([half.combine for half in self.halves]))
        self._side: torch.cuda.Stream | None = None
        if len(self.halves) > 1:
            self._side = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]  # -1 goes first

    def run(self) -> None:
        """Starts the whole decomposition on the current stream."""
        if self._side is None:
            run_in_turn(self.halves)
        else:
            first, second = self.halves
            run_beside(first, second, self._side)

    def capture(self) -> torch.cuda.CUDAGraph:
        """A CUDA graph of :meth:`run`; replay it after :meth:`fill` for other data. The graph keeps the plan, in whose
        memory it works, as its attribute ``plan``.

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
        graph.plan = self  # type: ignore[attr-defined]
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
        return Components(self.pool, self._results(), self.settings, "pool")

    def decomposition(self) -> Decomposition:
        """The last run as :func:`fastlora.decompose` returns it, with its report."""
        return Decomposition(self.pool, "pool", whole=self.components())

    def adapters(self) -> dict[str, Adapter]:
        """The results of the last run, ``shared`` and ``unique/<name>``, on the device.

        They lie in the plan's own memory: the next run overwrites them, so save or clone them before. Where float16
        memory does not hold the digits of a result, or a scaling is extreme, it is a sum on the pool's matrices
        instead, and saving shares its size out between the factors."""
        results = self._results()
        outside = outside_range(self.parts, self._memory, self.dtype)
        updates = PlannedUpdates(self.pool, results, self.settings, self._memory, outside)
        parts = Components(self.pool, results, self.settings, "pool", updates=updates, dtype=self.dtype)
        return Decomposition(self.pool, "pool", whole=parts).adapters()

    def _results(self) -> dict[str, ModuleResult]:
        """What the last run found in every module that two adapters have."""
        results = {result.module: result for part in self.parts for result in part.results()}
        return {m: results[m] for m in self.pool.modules if m in results}


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
