"""Shared and unique parts as adapters, made of one chain's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import BaseInfo
from fastlora.core.dtypes import widest
from fastlora.core.factors import Factor, Term, add
from fastlora.core.sums import common_base
from fastlora.core.updates import Update, with_rank_zero
from fastlora.decomposition.devec import Coefficients, ModuleResult, Settings
from fastlora.runtime.cpython import paused_collector

# Matrices r×r that are in memory for one pair of one module: its Gram blocks, what is made of them, and copies.
BLOCKS_OF_PAIR = 32


class Components:
    """Shared and unique parts of some adapters: the result of one chain, module by module."""

    def __init__(self, pool: Pool, results: Mapping[str, ModuleResult], settings: Settings, label: str) -> None:
        self.pool = pool
        self.results = dict(results)
        self.settings = settings
        self.label = label
        self._pool_updates = {a.name: a.updates for a in pool.adapters}

    @property
    def spectrum(self) -> dict[str, Tensor]:
        """``{module: eigenvalues}``, descending by real part, complex where they are."""
        return {m: r.values for m, r in self.results.items()}

    @property
    @paused_collector()
    def shared(self) -> Adapter:
        """The one adapter that holds what all share, MATH (10); rank 0 in modules that share nothing."""
        found = self._shared_updates(None)
        updates = {m: found.get(m) or with_rank_zero(self._owner(m)) for m in self.pool.modules}
        base = common_base(self.pool.adapters)
        return self._adapter("shared", updates, replace(base, modules_to_save=(), bias="none"), self.pool.names)

    @paused_collector()
    def shared_of(self, name: str) -> Adapter:
        """What of adapter ``name`` lies in the shared directions, MATH (7)."""
        adapter = self.pool[name]
        found = self._shared_updates(name)
        updates = {m: found.get(m) or with_rank_zero(u) for m, u in adapter.updates.items()}
        base = replace(adapter.base, modules_to_save=(), bias="none")
        return self._adapter(f"shared_of({name})", updates, base, [name])

    @paused_collector()
    def unique_of(self, name: str) -> Adapter:
        """Adapter ``name`` without the shared directions, MATH (8); with it stay its biases and replaced modules."""
        adapter = self.pool[name]
        updates = dict(adapter.updates)
        for coefficients, results in self._sharing(name).items():
            i, ranks = results[0].names.index(name), results[0].ranks
            rows = [r.row for r in results]
            norms = coefficients.sigma[rows, i, 0].tolist()
            for result, own, norm in zip(results, coefficients.removals(rows, i, ranks), norms, strict=True):
                updates[result.module] = self._unique_update(result, i, own, norm)
        unique = self._adapter(f"unique_of({name})", updates, adapter.base, [name])
        return replace(unique, extras=adapter.extras)

    def _adapter(self, name: str, updates: Mapping[str, Update], base: BaseInfo, names: Sequence[str]) -> Adapter:
        own = [self.pool[n] for n in names]
        provenance = {
            "devec": name,
            "mode": self.label,
            "threshold": self.settings.threshold,
            "chain": self.settings.chain,
            "side": self.settings.side,
            "rank": self.settings.rank,
            "energy": self.settings.energy,
            "pool": {n: self.pool[n].provenance for n in self.pool.names},
        }
        return Adapter(name, updates, base=base, dtype=widest(a.dtype for a in own), provenance=provenance)

    def _sharing(self, name: str | None) -> dict[Coefficients, list[ModuleResult]]:
        """The modules in which adapter ``name``, or any, shares something, by the coefficients that they are rows
        of."""
        found: dict[Coefficients, list[ModuleResult]] = {}
        for result in self.results.values():
            if result.count and (name is None or name in result.names):
                found.setdefault(result.coefficients, []).append(result)
        return found

    def _owner(self, module: str) -> Update:
        """The first adapter's update of a module, whose shape and layout the shared part has."""
        return self.pool.adapters[self.pool.present(module)[0]].updates[module]

    def _sides(self, name: str, module: str) -> tuple[Factor, Factor]:
        """(projected factor, other factor) of one adapter in one module."""
        update = self._pool_updates[name][module]
        return (update.B, update.A) if self.settings.side == "left" else (update.A, update.B)

    def _basis(self, result: ModuleResult) -> Factor:
        """``Z`` as a factor: orthonormal, ``count`` columns (rows on the A side)."""
        movers = zip(result.names, result.basis, strict=True)
        return add(self._sides(name, result.module)[0].times(b) for name, b in movers if b is not None)

    def _assemble(self, like: Update, projected: Factor, other: Factor, scaling: float, floor: float) -> Update:
        left, right = (projected, other) if self.settings.side == "left" else (other, projected)
        return Update(left, right, scaling, like.layout, floor)

    def _shared_updates(self, name: str | None) -> dict[str, Update]:
        """``Z · Σ_i w_i s_i H_i A_i`` with the weights of MATH (10), or of adapter ``name`` alone with weight 1, in the
        modules where that is not zero."""
        found: dict[str, Update] = {}
        for coefficients, results in self._sharing(name).items():
            names, ranks = results[0].names, results[0].ranks
            full = coefficients.H.shape[-1]
            members = [names.index(name)] if name is not None else list(range(len(names)))
            weights = [
                [w * self._pool_updates[names[i]][r.module].scaling for i, w in zip(members, own, strict=True)]
                for r in results
                for own in [r.weights if name is None else (1.0,)]
            ]
            weighted = coefficients.weighted([r.row for r in results], members, weights)
            for result, own, small in zip(results, weights, weighted, strict=True):
                terms: list[Term] = []
                for i, weight, h in zip(members, own, small[:, : result.count].unbind(), strict=True):
                    if weight != 0.0:
                        h = h if ranks[i] == full else h[:, : ranks[i]]
                        other = self._sides(names[i], result.module)[1]
                        terms += other.applied(h if other.side == "A" else h.mT).terms
                if terms:
                    basis, like = self._basis(result), self._owner(result.module)
                    other = replace(self._sides(names[0], result.module)[1], rank=result.count, terms=tuple(terms))
                    found[result.module] = self._assemble(like, basis, other, 1.0, 0.0)
        return found

    def _unique_update(self, result: ModuleResult, i: int, removals: Sequence[Tensor], norm: float) -> Update:
        update = self._pool_updates[result.names[i]][result.module]
        left = self.settings.side == "left"
        projected, other = (update.B, update.A) if left else (update.A, update.B)
        terms = list(projected.terms)
        for name, removal in zip(result.names, removals, strict=False):
            mover = self._sides(name, result.module)[0]
            terms += mover.applied(removal if left else removal.mT).terms
        unique = Factor(projected.side, projected.length, projected.rank, tuple(terms))
        floor = max(update.floor, result.rtol * norm)
        return self._assemble(update, unique, other, update.scaling, floor)
