"""Everything that needs only inner products of a pool, after one read of its factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import sources
from fastlora.engine.blocks import read_pair_blocks
from fastlora.engine.gram_cache import GramCache, enter, leave
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.analysis.similar import Overlap
    from fastlora.coefficients.weighted_svd import WeightedSVD
    from fastlora.decomposition.result import Decomposition


class PoolGram:
    """The Gram blocks of all pairs of a pool, on both sides, kept in memory.

    Costs two passes over the factors (one over the ``B``, one over the ``A``) when it is made, and about
    ``8·(Σ r_i)²`` bytes a module. After that no factor is read but to form results, one *combine* each: norms, cosines,
    decompositions at other thresholds, merges with other weights. Use its methods, or any function of fastlora inside
    ``with gram:``; there, results have the same bits as without.

        gram = fl.PoolGram(pool)
        for weight in (0.1, 0.2, 0.3):
            gram.merge({"a": weight, "b": 1 - weight}, rank=16).save(f"merged-{weight}")

    The stored matrices of the pool stay in memory (or mapped) as long as this object, and must not be changed. One
    object serves any number of threads and tasks: ``with gram:`` holds in the one that enters it.

    Raises:
        NonFiniteError: a factor that holds NaN or Inf, by adapter and module.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._cache = GramCache()
        self._svd: WeightedSVD | None = None
        self._cache.hold(sources(u for a in pool.adapters for u in a.updates.values()))
        k = len(pool)
        inner_products: dict[str, Tensor] = {}
        with self:
            for blocks in read_pair_blocks(pool):
                index, inner = torch.tensor(blocks.members), blocks.inner()
                for g, module in enumerate(blocks.modules):
                    inner_products[module] = torch.zeros(k, k, dtype=torch.float64)
                    inner_products[module][index[:, None], index] = inner[g]
        self._inner = {m: inner_products[m] for m in pool.modules}

    def inner(self, module: str | None = None) -> Tensor:
        """``⟨ΔW_i, ΔW_j⟩`` of one ``module`` or summed over all, MATH (13).

        Returns float64 ``[k, k]`` in the order of the pool; an adapter that lacks a module counts as zero there. Raises
        :class:`InputError` for an unknown module. No factor is read.
        """
        if module is None:
            return torch.stack(list(self._inner.values())).sum(0)
        if module not in self._inner:
            raise InputError(f"the pool has no module {module!r} (`.pool.modules` lists all {len(self._inner)})")
        return self._inner[module].clone()

    def norms(self, module: str | None = None) -> dict[str, float]:
        """``‖ΔW_i‖_F`` by name, of one ``module`` or of all together. Raises as :meth:`inner`; no factor is read."""
        values = self.inner(module).diagonal().clamp(min=0).sqrt().tolist()
        return dict(zip(self.pool.names, values, strict=True))

    def merge(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        method: str = "svd",
        rank: int | None = None,
        energy: float | None = None,
        **parameters: Any,
    ) -> Adapter:
        """:func:`fastlora.merge` of the pool, equal to rounding.

        ``weights``, ``method``, ``rank``, ``energy`` and the method's own ``parameters`` are those of
        :func:`fastlora.merge`, and so is what is raised.
        With ``method="svd"`` the second merge and all after it take a fraction of the time: what does not depend on the
        weights is kept.
        """
        from fastlora.coefficients.weighted_svd import WeightedSVD
        from fastlora.merging.merge import full_weights, merge

        with self:
            if method != "svd" or parameters:
                return merge(self.pool, weights, method=method, rank=rank, energy=energy, **parameters)
            counted, notes = full_weights(self.pool, weights)
            if self._svd is None:
                self._svd = WeightedSVD(self.pool)
            merged = self._svd.merge(counted, rank, energy)
        return replace(merged, notes=(*merged.notes, *notes))

    def decompose(self, threshold: float | str = 0.85, **settings: Any) -> Decomposition:
        """:func:`fastlora.decompose` of the pool with a ``threshold`` and other settings of that function."""
        from fastlora.decomposition.decompose import decompose

        with self:
            return decompose(self.pool, threshold, **settings)

    def overlap(self) -> Overlap:
        """:func:`fastlora.overlap` of the pool."""
        from fastlora.analysis.overlap import overlap

        with self:
            return overlap(self.pool)

    def __enter__(self) -> PoolGram:
        enter(self._cache)
        return self

    def __exit__(self, *error: Any) -> None:
        leave(self._cache)

    def __repr__(self) -> str:
        return f"PoolGram({self.pool!r})"
