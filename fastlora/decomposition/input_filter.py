"""One module of an input-aware decomposition: the filter on ``A``, in coefficients on rows of inputs.

``X = argmin ‖(X − ΔW_t) C_t^½‖² + μ Σ_j ‖X C_j^½‖² + ε‖X‖²`` has the ``B`` of ``ΔW_t`` and
``A' = A C_t (C_t + μ Σ_j C_j + εI)⁻¹``. With ``Y`` the rows of all adapters, those of ``t`` over ``√N_t`` and those of
``j`` times ``√(μ/N_j)``, this is ``A' = [A Y_tᵀ, 0] (YYᵀ + εI)⁻¹ Y``: a combination of rows, and nothing of the size
``[m, m]`` is formed. Where there are more rows than columns, ``C_t + μ Σ_j C_j`` is the smaller matrix.

Products with rows are float64, since ``YYᵀ`` has the square of their condition number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.core.factors import Factor, Term, add
from fastlora.core.updates import Update
from fastlora.merging.site_factors import factored, inverse_of, mean_scales, over_rows, weighted


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One input of the model: rows that the adapters saw. ``rows``: ``[N_i, m]`` of each, as they are stored.
    ``scales``: ``1/√N_i`` of each.

    ``gram``: their products ``[N, N]`` where ``N ≤ m``, else ``None``. What was computed on the way: ``inverses``, for
    ``μ = 1`` and a ridge (:func:`inverse_of`); ``covariance``, ``ΣC_i [m, m]`` where ``N > m``.
    """

    rows: tuple[Tensor, ...]
    gram: Tensor | None
    scales: list[float]
    inverses: dict[float, tuple[Tensor | None, float]] = field(default_factory=dict)
    covariance: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(
        rows: Sequence[Tensor], gram: Tensor | None, inverses: dict[float, tuple[Tensor | None, float]] | None = None
    ) -> Site:
        """A site; ``inverses`` where they are kept for other times."""
        return Site(tuple(rows), gram, mean_scales(rows), {} if inverses is None else inverses)

    @property
    def width(self) -> int:
        """``m``."""
        return self.rows[0].shape[1]

    def weights(self, t: int, mu: float) -> list[float]:
        """What the rows of each are multiplied with in ``Y``: ``1/√N_t`` of the own ones, ``√(μ/N_j)`` of others."""
        return [s * (1.0 if i == t else math.sqrt(mu)) for i, s in enumerate(self.scales)]

    def own_covariance(self, t: int) -> Tensor:
        """``C_t [m, m]``."""
        scaled = self.rows[t].double() * self.scales[t]
        return scaled.mT @ scaled

    def whole_covariance(self) -> Tensor:
        """``ΣC_i [m, m]``."""
        if not self.covariance:
            scaled = torch.cat([x.double() * s for x, s in zip(self.rows, self.scales, strict=True)])
            self.covariance.append(scaled.mT @ scaled)
        return self.covariance[0]

    @property
    def size(self) -> int:
        """Of the matrix that is factored."""
        return self.width if self.gram is None else len(self.gram)

    def inverse(self, ridge: float) -> tuple[Tensor | None, float]:
        """The inverse of :meth:`operator` for ``μ = 1``, with ``ε`` on its diagonal, and ``ε``; kept. With ``gram``."""
        assert self.gram is not None
        if ridge not in self.inverses:
            weights = over_rows(self.weights(0, 1.0), self.rows)
            self.inverses[ridge] = inverse_of(self.gram, weights, ridge, self.width)
        return self.inverses[ridge]

    def operator(self, t: int, mu: float) -> Tensor:
        """``YYᵀ`` or ``YᵀY``, whichever is the smaller, with the weights of an adapter; a new matrix."""
        if self.gram is not None:
            return weighted(self.gram, over_rows(self.weights(t, mu), self.rows))
        total = self.whole_covariance() * mu
        return total if mu == 1.0 else total.add_(self.own_covariance(t), alpha=1.0 - mu)


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """``A'`` of one adapter in one module, at position ``t`` of a site with these ``rows``, whose ``weights`` in ``Y``
    these are.

    ``own``: ``A X_tᵀ [r, N_t]``. ``solved``: ``[A Y_tᵀ, 0](YYᵀ + εI)⁻¹ [r, N]``, or ``A' [r, m]`` where the rows are
    more than the columns.
    """

    rows: tuple[Tensor, ...]
    weights: list[float]
    t: int
    epsilon: float
    own: Tensor
    solved: Tensor

    @property
    def is_dual(self) -> bool:
        """Whether ``solved`` are coefficients of rows."""
        return is_dual(self.rows)

    @property
    def right(self) -> Factor:
        """``A'``: a sum over the stored rows, or one float64 matrix where the rows are more than the columns."""
        if not self.is_dual:
            return Factor.of("A", self.solved)
        parts = torch.split_with_sizes(self.solved, [len(x) for x in self.rows], 1)
        weighted = zip(self.rows, parts, self.weights, strict=True)
        terms = tuple(Term(x, part, 0, weight) for x, part, weight in weighted if len(x) and weight)
        return Factor("A", self.rows[0].shape[1], len(self.solved), terms)

    def kept(self, square: Tensor) -> float:
        """``‖X‖`` of the unique part, from ``s²BᵀB``."""
        inner = self.solved @ self.solved.mT
        if self.is_dual:  # Z YYᵀ Zᵀ with Z(YYᵀ + εI) = [A Y_tᵀ, 0]
            mine = self.solved[:, places_of(self.rows)[self.t]]
            inner = self.weights[self.t] * (self.own @ mine.mT) - self.epsilon * inner
        return math.sqrt(max(float((square * inner).sum()), 0.0))


def is_dual(rows: Sequence[Tensor]) -> bool:
    """Whether the products of rows are the smaller matrix, not those of columns."""
    return sum(len(x) for x in rows) <= rows[0].shape[1]


def places_of(rows: Sequence[Tensor]) -> list[slice]:
    """Of the rows of each among those of all."""
    ends = list(itertools.accumulate(len(x) for x in rows))
    return [slice(end - len(x), end) for end, x in zip(ends, rows, strict=True)]


def complement(update: Update, filtered: Factor) -> Factor:
    """``A − A'``."""
    return add([update.A, filtered.scaled(-1.0)])


def solved(site: Site, products: Sequence[tuple[int, Tensor]], mu: float, ridge: float) -> list[tuple[Tensor, float]]:
    """``solved`` and ``ε`` of filters (:class:`Filter`) at one site, from ``A X_tᵀ [r, N_t]`` and the position ``t`` of
    each.

    One matrix is factored for every adapter; for ``μ = 1`` it is the same one for all.

    Raises :class:`InputError` for a ridge that rounding hides.
    """
    if mu == 1.0 and site.gram is not None:
        return _by_inverse(site, products, ridge)
    groups: dict[int, list[int]] = {}
    for i, (t, _) in enumerate(products):
        groups.setdefault(0 if mu == 1.0 else t, []).append(i)
    places, scales = places_of(site.rows), site.scales
    found: dict[int, tuple[Tensor, float]] = {}
    for members in groups.values():
        factor, epsilon = factored(site.operator(products[members[0]][0], mu), ridge, site.width)
        sizes = [len(products[i][1]) for i in members]
        right = torch.zeros(sum(sizes), site.size, dtype=torch.float64)
        if factor is not None:
            for i, row in zip(members, torch.split_with_sizes(right, sizes), strict=True):
                t, product = products[i]
                if site.gram is None:
                    torch.matmul(product, site.rows[t].double() * scales[t] ** 2, out=row)
                else:
                    torch.mul(product, scales[t], out=row[:, places[t]])
            right = torch.cholesky_solve(right.mT, factor).mT  # rows are contiguous
        found |= {i: (row, epsilon) for i, row in zip(members, torch.split_with_sizes(right, sizes), strict=True)}
    return [found[i] for i in range(len(products))]


def _by_inverse(site: Site, products: Sequence[tuple[int, Tensor]], ridge: float) -> list[tuple[Tensor, float]]:
    """:func:`solved` for ``μ = 1``: ``A Y_tᵀ`` times the rows of ``t`` of the inverse."""
    inverse, epsilon = site.inverse(ridge)
    members: dict[int, list[int]] = {}
    for i, (t, _) in enumerate(products):
        members.setdefault(t, []).append(i)
    places = places_of(site.rows)
    found: dict[int, Tensor] = {}
    for t, mine in members.items():
        own = torch.cat([products[i][1] for i in mine])
        if inverse is None:
            solution = torch.zeros(len(own), site.size, dtype=torch.float64)
        else:
            solution = own.mul_(site.scales[t]) @ inverse[places[t]]
        found |= zip(mine, torch.split_with_sizes(solution, [len(products[i][1]) for i in mine]), strict=True)
    return [(found[i], epsilon) for i in range(len(products))]
