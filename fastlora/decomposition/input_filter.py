"""One module of an input-aware decomposition: the filter on ``A``, in coefficients on rows of inputs.

``X = argmin ‖(X − ΔW_t) C_t^½‖² + μ Σ_j ‖X C_j^½‖² + ε‖X‖²`` has the ``B`` of ``ΔW_t`` and
``A' = A C_t (C_t + μ Σ_j C_j + εI)⁻¹``. With ``Y`` the rows of all adapters, those of ``t`` over ``√N_t`` and those of
``j`` times ``√(μ/N_j)``, this is ``A' = [A Y_tᵀ, 0] (YYᵀ + εI)⁻¹ Y``: a combination of rows, and nothing of the size
``[m, m]`` is formed. Where there are more rows than columns, ``C_t + μ Σ_j C_j`` is the smaller matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.core.factors import Factor, Term, add
from fastlora.core.updates import Update
from fastlora.merging.forms.inputs import dense

STEPS = (0.1, 1.0, 10.0)
"""Multiples of μ that a report compares."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One input of the model: rows that the adapters saw. ``rows``: ``[N_i, m]`` of each, as they are stored.
    ``scaled [N, m]``: all of them over ``√N_i``, float64. ``gram [N, N]``: their products; needed where ``N ≤ m``.

    ``solvers``: factors of what is inverted, since modules with one input invert the same, and for μ = 1 all adapters.
    """

    rows: tuple[Tensor, ...]
    scaled: Tensor
    gram: Tensor
    solvers: dict[tuple[int, float], Tensor | None] = field(default_factory=dict)

    @staticmethod
    def of(rows: Sequence[Tensor]) -> Site:
        """Cost: ``N²·m`` operations in float64."""
        scaled = torch.cat([x.double() / math.sqrt(max(len(x), 1)) for x in rows])
        return Site(tuple(rows), scaled, scaled @ scaled.mT if len(scaled) <= scaled.shape[1] else scaled[:0])

    @property
    def lengths(self) -> list[int]:
        """``N_i``."""
        return [len(x) for x in self.rows]

    @property
    def count(self) -> int:
        """``N``."""
        return len(self.scaled)

    @property
    def width(self) -> int:
        """``m``."""
        return self.scaled.shape[1]

    @property
    def is_dual(self) -> bool:
        """Whether ``[N, N]`` is the smaller matrix."""
        return self.count <= self.width

    def solver(self, mine: slice, mu: float, ridge: float) -> Tensor | None:
        """The Cholesky factor of ``YYᵀ + εI`` or ``YᵀY + εI`` for the weights of one adapter; ``None`` where no input
        is other than zero."""
        key = (-1 if mu == 1.0 else mine.start), mu
        if key not in self.solvers:
            d = self.weights(mine, mu)
            if self.is_dual:
                total = d[:, None] * self.gram * d
            else:
                weighted = self.scaled * d[:, None]
                total = weighted.mT @ weighted
            epsilon = ridge * float(total.diagonal().sum()) / self.width
            total.diagonal().add_(epsilon)
            self.solvers[key] = torch.linalg.cholesky(total) if epsilon > 0.0 else None
        return self.solvers[key]

    def weights(self, mine: slice, mu: float) -> Tensor:
        """The factor of every row of ``Y``: 1 of the own ones, ``√μ`` of others."""
        weights = torch.full((self.count,), math.sqrt(mu), dtype=torch.float64)
        weights[mine] = 1.0
        return weights


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one adapter in one module, squares: of ``‖ΔW‖`` and ``‖X‖``; of the outputs on its own inputs, whole, and what
    of them ``X`` changes; of the outputs on inputs of others, whole and left. ``at``: the same four of ``X`` for other
    multiples of μ."""

    whole: float
    kept: float
    own: float
    missed: float
    others: float
    left: float
    at: tuple[tuple[float, float, float], ...]  # kept, missed, left for each of STEPS


def filtered(site: Site, t: int, update: Update, square: Tensor, mu: float, ridge: float) -> tuple[Factor, Measured]:
    """``A'`` of the adapter at position ``t`` of the site, and what it keeps. ``square``: ``BᵀB [r, r]``.

    The factor is a sum over the stored rows, or one float64 matrix where the rows are more than the columns.
    """
    A = dense(update.A)
    start = sum(site.lengths[:t])
    mine = slice(start, start + site.lengths[t])
    products = A @ site.scaled.mT  # A Yᵀ without weights, [r, N]
    square = update.scaling**2 * square
    found = {step: _solved(site, mine, products, mu * step, ridge) for step in STEPS}
    measured = [_measured(site, mine, products, square, weights) for weights in found.values()]
    whole = _inner(square, A @ A.mT)
    own, others = _inner(square, products[:, mine] @ products[:, mine].mT), _of_others(square, products, mine)
    kept, missed, left = measured[STEPS.index(1.0)]
    told = Measured(whole, kept, own, missed, others, left, tuple(measured))
    return _factor(site, found[1.0], update.A.length), told


def complement(update: Update, filtered: Factor) -> Factor:
    """``A − A'``."""
    return add([update.A, filtered.scaled(-1.0)])


def _solved(site: Site, mine: slice, products: Tensor, mu: float, ridge: float) -> Tensor:
    """``G [r, N]`` with ``A' = G Y`` for rows over ``√N_i``; where there are more rows than columns, ``A' [r, m]``."""
    factor = site.solver(mine, mu, ridge)
    if not site.is_dual:
        own = products[:, mine] @ site.scaled[mine]
        return torch.zeros_like(own) if factor is None else torch.cholesky_solve(own.mT, factor).mT
    if factor is None:
        return torch.zeros_like(products)
    own = torch.zeros_like(products)
    own[:, mine] = products[:, mine]
    return torch.cholesky_solve(own.mT, factor).mT * site.weights(mine, mu)


def _factor(site: Site, found: Tensor, length: int) -> Factor:
    rank = len(found)
    if not site.is_dual:
        return Factor.of("A", found)
    terms = []
    for x, part in zip(site.rows, torch.split_with_sizes(found, site.lengths, 1), strict=True):
        if len(x):
            terms.append(Term(x, (part / math.sqrt(len(x))).contiguous()))
    return Factor("A", length, rank, tuple(terms))


def _measured(site: Site, mine: slice, products: Tensor, square: Tensor, found: Tensor) -> tuple[float, float, float]:
    """``‖X‖²``, ``‖(X − ΔW) X_tᵀ‖²/N_t`` and ``Σ_j ‖X X_jᵀ‖²/N_j``."""
    outputs = found @ (site.gram if site.is_dual else site.scaled.mT)
    norm = found @ (outputs if site.is_dual else found).mT
    missed = outputs[:, mine] - products[:, mine]
    return _inner(square, norm), _inner(square, missed @ missed.mT), _of_others(square, outputs, mine)


def _of_others(square: Tensor, outputs: Tensor, mine: slice) -> float:
    rest = torch.cat([outputs[:, : mine.start], outputs[:, mine.stop :]], 1)
    return _inner(square, rest @ rest.mT)


def _inner(square: Tensor, other: Tensor) -> float:
    """``tr(BᵀB · M)``, which rounding must not make negative."""
    return max(float((square * other).sum()), 0.0)
