"""Shared and unique parts as adapters, made of one chain's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.data import BaseInfo, Extra
from fastlora.core.dtypes import widest
from fastlora.core.sums import common_base
from fastlora.core.updates import Update, with_rank_zero
from fastlora.decomposition.devec import ModuleResult, Settings
from fastlora.decomposition.part_updates import LazyUpdates, PartUpdates
from fastlora.runtime.cpython import paused_collector


class Components:
    """Shared and unique parts of some adapters: the result of one chain, module by module.

    ``updates``: where those of the parts come from, by default sums on the pool's stored factors. ``dtype``: of the
    parts, by default the widest of the adapters that each is made of.
    """

    def __init__(
        self,
        pool: Pool,
        results: Mapping[str, ModuleResult],
        settings: Settings,
        label: str,
        *,
        updates: PartUpdates | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.pool = pool
        self.results = dict(results)
        self.settings = settings
        self.label = label
        self.dtype = dtype
        self._updates = LazyUpdates(pool, self.results, settings) if updates is None else updates
        self._shares_some = any([result.count for result in self.results.values()])
        self._origin = {
            "mode": label,
            "threshold": settings.threshold,
            "chain": settings.chain,
            "side": settings.side,
            **({"weighting": settings.weighting, "rho": settings.rho} if settings.weighting else {}),
            "rank": settings.rank,
            "energy": settings.energy,
        }

    @property
    def spectrum(self) -> dict[str, Tensor]:
        """``{module: eigenvalues}``, descending by real part, complex where they are."""
        return {m: r.values for m, r in self.results.items()}

    @property
    @paused_collector()
    def shared(self) -> Adapter:
        """The one adapter that holds what all share, MATH (10); rank 0 in modules that share nothing."""
        shared = self._updates.shared(None)
        updates: dict[str, Update] = {}
        for adapter in reversed(self.pool.adapters):  # of the first adapter that has a module, in the order of the pool
            updates.update(adapter.updates)
        updates = {m: shared.get(m) or with_rank_zero(updates[m]) for m in self.pool.modules}
        base = common_base(self.pool.adapters)
        return self._adapter("shared", updates, replace(base, modules_to_save=(), bias="none"), self.pool.names)

    @paused_collector()
    def shared_of(self, name: str) -> Adapter:
        """What of adapter ``name`` lies in the shared directions, MATH (7)."""
        adapter = self.pool[name]
        shared = self._updates.shared(name)
        updates = {m: shared.get(m) or with_rank_zero(u) for m, u in adapter.updates.items()}
        base = replace(adapter.base, modules_to_save=(), bias="none")
        return self._adapter(f"shared_of({name})", updates, base, [name])

    def unique_of(self, name: str) -> Adapter:
        """Adapter ``name`` without the shared directions, MATH (8); with it stay its biases and replaced modules."""
        adapter = self.pool[name]
        updates = dict(adapter.updates)
        if self._shares_some:
            with paused_collector():
                updates |= self._updates.unique(name)
        return self._adapter(f"unique_of({name})", updates, adapter.base, [name], adapter.extras)

    def _adapter(
        self,
        part: str,
        updates: Mapping[str, Update],
        base: BaseInfo,
        names: Sequence[str],
        extras: Mapping[str, Extra] | None = None,
    ) -> Adapter:
        """A part that is made of the adapters ``names``."""
        pool = {a.name: a.provenance for a in self.pool.adapters}
        provenance = {"devec": part, **self._origin, "pool": pool}
        own = [self.pool[n] for n in names]
        dtype = widest([a.dtype for a in own]) if self.dtype is None else self.dtype
        notes = tuple(dict.fromkeys([note for a in own for note in a.notes]))
        return Adapter(part, updates, base=base, dtype=dtype, provenance=provenance, extras=extras or {}, notes=notes)
