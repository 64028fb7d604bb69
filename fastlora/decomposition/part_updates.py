"""The updates of shared and unique parts: sums of the projected factors ``X_j`` and of the other ones, with the small
coefficients of a chain. Results that are looked at or saved and those of a plan are put together by the same sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Protocol

from torch import Tensor

from fastlora.adapters.pool import Pool
from fastlora.core.factors import Factor, Term
from fastlora.core.updates import NO_NOISE, Noise, Update, sides
from fastlora.decomposition.devec import ModuleResult, ResultBatch, Settings, unique_noise


class PartUpdates(Protocol):
    """Where the updates of the parts of a decomposition come from."""

    def shared(self, name: str | None) -> dict[str, Update]:
        """The shared part of adapter ``name``, MATH (7), or that of all, MATH (10), in modules where it is not zero."""

    def unique(self, name: str) -> dict[str, Update]:
        """The unique part of adapter ``name``, MATH (8), in modules where it is not the adapter itself."""


def combination(factors: Sequence[Factor], coefficients: Sequence[Tensor]) -> Factor:
    """``Σ_j X_j C_j`` on the B side, ``Σ_j C_j X_j`` on the A side: float64 ``C_j [r_j, q]`` or ``[q, r_j]``.

    Coefficients with contiguous rows are used where they lie: the sum follows what they hold.
    """
    terms: list[Term] = []
    for x, C in zip(factors, coefficients, strict=True):
        terms += x.terms_on(C)
    first = factors[0]
    return Factor(first.side, first.length, coefficients[0].shape[1 if first.side == "B" else 0], tuple(terms))


def unique_factor(start: Factor, movers: Iterable[Factor], removals: Iterable[Tensor]) -> Factor:
    """The projected side of a unique part, MATH (8): ``X_i`` and the :func:`combination` of the removals
    ``−basis_j H_i``."""
    terms = list(start.terms)
    for x, C in zip(movers, removals, strict=True):
        terms += x.terms_on(C)
    return Factor(start.side, start.length, start.rank, tuple(terms))


def _cut(small: Tensor, rows: int, columns: int) -> Tensor:
    """A coefficient without its padding."""
    return small if small.shape == (rows, columns) else small[:rows, :columns]


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
        self._projected_of, self._other_of = map(attrgetter, sides(settings.side))
        self._updates = {a.name: a.updates for a in pool.adapters}
        self._shared_results = [result for result in results.values() if result.count]

    def shared(self, name: str | None) -> dict[str, Update]:
        """``Z · Σ_i w_i s_i H_i A_i``, with the weights of MATH (10), or with weight 1 of adapter ``name`` alone."""
        updates: dict[str, Update] = {}
        for batch, results in self._sharing(name).items():
            names, ranks, rows = results[0].names, results[0].ranks, [r.row for r in results]
            members = list(range(len(names))) if name is None else [names.index(name)]
            weights = [self.mixing_weights(result, members, name) for result in results]
            small = iter(batch.weighted(rows, members, weights))
            bases = iter(batch.bases(rows))
            movers = [self._updates[n] for n in names[: batch.basis.shape[1]]]
            own = [(self._updates[names[i]], ranks[i]) for i in members]
            projected_of, other_of = self._projected_of, self._other_of
            for result, row in zip(results, weights, strict=True):
                module, count = result.module, result.count
                projected = [projected_of(u[module]) for u in movers]
                basis = self._laid([_cut(next(bases), x.rank, count) for x in projected])
                others, coefficients = [], []
                for (mine, rank), weight in zip(own, row, strict=True):
                    H, other = next(small), other_of(mine[module])
                    if weight != 0.0 and other.terms:
                        others.append(other)
                        coefficients.append(_cut(H, count, rank))
                if others:
                    Z, mixed = combination(projected, basis), combination(others, self._laid(coefficients))
                    updates[module] = assembled(movers[0][module], self.side, Z, mixed, 1.0, NO_NOISE)
        return updates

    def unique(self, name: str) -> dict[str, Update]:
        """``X_i + Σ_j X_j C_j`` on the projected side; the other side stays as it is."""
        updates: dict[str, Update] = {}
        for batch, results in self._sharing(name).items():
            names, ranks = results[0].names, results[0].ranks
            i, rows = names.index(name), [r.row for r in results]
            movers, own = [self._updates[n] for n in names[: batch.basis.shape[1]]], self._updates[name]
            small = iter(batch.removals(rows, i))
            projected_of, other_of = self._projected_of, self._other_of
            for result, largest in zip(results, batch.sigma[rows, i, 0].tolist(), strict=True):
                module = result.module
                update = own[module]
                start, other = projected_of(update), other_of(update)
                projected = [projected_of(u[module]) for u in movers]
                removals = self._laid([_cut(next(small), x.rank, ranks[i]) for x in projected])
                unique = unique_factor(start, projected, removals)
                noise = unique_noise(update, result.rtol, largest)
                updates[module] = assembled(update, self.side, unique, other, update.scaling, noise)
        return updates

    def mixing_weights(self, result: ModuleResult, members: Sequence[int], name: str | None) -> list[float]:
        """``w_i s_i`` of some members, MATH (10); ``w_i = 1`` of adapter ``name`` alone."""
        weights, names, module = result.weights if name is None else (1.0,), result.names, result.module
        return [w * self._updates[names[i]][module].scaling for w, i in zip(weights, members, strict=True)]

    def _laid(self, small: list[Tensor]) -> list[Tensor]:
        """Coefficients of the projected side as the terms of a sum on the left, or of the other side on the right."""
        return small if self.is_left else [C.mT for C in small]

    def _sharing(self, name: str | None) -> dict[ResultBatch, list[ModuleResult]]:
        """The modules in which adapter ``name``, or any, shares something, by the batch that they are rows of."""
        batches: dict[ResultBatch, list[ModuleResult]] = {}
        for result in self._shared_results:
            if name is None or name in result.names:
                batches.setdefault(result.batch, []).append(result)
        return batches
