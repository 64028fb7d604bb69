"""The updates of shared and unique parts: sums of the projected factors ``X_j`` and of the other ones, with the small
coefficients of a chain. Results that are looked at or saved and those of a plan are put together by the same sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor, add
from fastlora.core.updates import NO_NOISE, Noise, Update, factor, sides
from fastlora.decomposition.devec import ModuleResult, ResultBatch, Settings


class PartUpdates(Protocol):
    """Where the updates of the parts of a decomposition come from."""

    def shared(self, name: str | None) -> dict[str, Update]:
        """The shared part of adapter ``name``, MATH (7), or that of all, MATH (10), in modules where it is not zero."""

    def unique(self, name: str) -> dict[str, Update]:
        """The unique part of adapter ``name``, MATH (8), in modules where it is not the adapter itself."""


def combination(factors: Iterable[Factor], coefficients: Iterable[Tensor]) -> Factor:
    """``Σ_j X_j C_j`` on the B side, ``Σ_j C_j X_j`` on the A side: float64 ``C_j [r_j, q]`` or ``[q, r_j]``.

    Coefficients with contiguous rows are used where they lie: the sum follows what they hold.
    """
    return add([x.applied(C) for x, C in zip(factors, coefficients, strict=True)])


def unique_factor(start: Factor, movers: Iterable[Factor], removals: Iterable[Tensor]) -> Factor:
    """The projected side of a unique part, MATH (8): ``X_i`` and the :func:`combination` of the removals
    ``−basis_j H_i``."""
    terms = list(start.terms)
    for x, C in zip(movers, removals, strict=True):
        terms += x.applied(C).terms
    return Factor(start.side, start.length, start.rank, tuple(terms))


def assembled(like: Update, side: str, projected: Factor, other: Factor, scaling: float, noise: Noise) -> Update:
    """The update of a part, in the layout of the module."""
    left, right = (projected, other) if side == "left" else (other, projected)
    return Update(left, right, scaling, like.layout, noise)


def first_update(pool: Pool, module: str) -> Update:
    """That of the first adapter which has the module: the shared part has its shape and layout."""
    return pool.adapters[pool.present(module)[0]].updates[module]


class LazyUpdates:
    """Updates on the stored factors of a pool, none of which is read here."""

    def __init__(self, pool: Pool, results: Mapping[str, ModuleResult], settings: Settings) -> None:
        self.pool = pool
        self.results = results
        self.side = settings.side
        self.is_left = settings.side == "left"
        self._projected_side, self._other_side = sides(settings.side)
        self._updates = {a.name: a.updates for a in pool.adapters}
        self._shared_results = [result for result in results.values() if result.count]

    def shared(self, name: str | None) -> dict[str, Update]:
        """``Z · Σ_i w_i s_i H_i A_i``, with the weights of MATH (10), or with weight 1 of adapter ``name`` alone."""
        updates: dict[str, Update] = {}
        for batch, results in self._sharing(name).items():
            names, ranks = results[0].names, results[0].ranks
            members = list(range(len(names))) if name is None else [names.index(name)]
            weights = [self.mixing_weights(result, members, name) for result in results]
            weighted = batch.weighted([r.row for r in results], members, weights)
            padded_rank = batch.H.shape[-1]
            for result, row, small in zip(results, weights, weighted, strict=True):
                others, coefficients = [], []
                for i, weight, H in zip(members, row, small[:, : result.count].unbind(), strict=True):
                    other = factor(self._updates[names[i]][result.module], self._other_side)
                    if weight != 0.0 and other.terms:
                        C = H if ranks[i] == padded_rank else H[:, : ranks[i]]
                        others.append(other)
                        coefficients.append(C if self.is_left else C.mT)
                if others:
                    like, mixed = first_update(self.pool, result.module), combination(others, coefficients)
                    updates[result.module] = assembled(like, self.side, self._basis(result), mixed, 1.0, NO_NOISE)
        return updates

    def unique(self, name: str) -> dict[str, Update]:
        """``X_i + Σ_j X_j C_j`` on the projected side; the other side stays as it is."""
        updates: dict[str, Update] = {}
        for batch, results in self._sharing(name).items():
            i, rows = results[0].names.index(name), [r.row for r in results]
            for result, removals in zip(results, batch.removals(rows, i, results[0].ranks), strict=True):
                update = self._updates[name][result.module]
                start, other = factor(update, self._projected_side), factor(update, self._other_side)
                coefficients = removals if self.is_left else [C.mT for C in removals]
                projected = unique_factor(start, self._movers(result), coefficients)
                noise = result.unique_noise(i, update)
                updates[result.module] = assembled(update, self.side, projected, other, update.scaling, noise)
        return updates

    def mixing_weights(self, result: ModuleResult, members: Sequence[int], name: str | None) -> list[float]:
        """``w_i s_i`` of some members, MATH (10); ``w_i = 1`` of adapter ``name`` alone."""
        weights = result.weights if name is None else (1.0,)
        scalings = [self._updates[result.names[i]][result.module].scaling for i in members]
        return [w * s for w, s in zip(weights, scalings, strict=True)]

    def _movers(self, result: ModuleResult) -> list[Factor]:
        """The projected factors that the shared directions of a module are made of."""
        names = result.names[: result.batch.basis.shape[1]]
        return [factor(self._updates[name][result.module], self._projected_side) for name in names]

    def _basis(self, result: ModuleResult) -> Factor:
        """``Z`` as a factor: orthonormal, ``count`` columns (rows on the A side)."""
        coefficients = [C for C in result.basis if C is not None]
        return combination(self._movers(result), coefficients if self.is_left else [C.mT for C in coefficients])

    def _sharing(self, name: str | None) -> dict[ResultBatch, list[ModuleResult]]:
        """The modules in which adapter ``name``, or any, shares something, by the batch that they are rows of."""
        batches: dict[ResultBatch, list[ModuleResult]] = {}
        for result in self._shared_results:
            if name is None or name in result.names:
                batches.setdefault(result.batch, []).append(result)
        return batches
