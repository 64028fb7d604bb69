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
from fastlora.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One input of the model: rows that the adapters saw. ``rows``: ``[N_i, m]`` of each, as they are stored.

    ``gram``: their products ``[N, N]`` where ``N ≤ m``, else ``None``. ``covariance``: ``ΣC_i [m, m]`` where ``N > m``,
    once it was needed.
    """

    rows: tuple[Tensor, ...]
    gram: Tensor | None
    covariance: list[Tensor] = field(default_factory=list)

    @property
    def width(self) -> int:
        """``m``."""
        return self.rows[0].shape[1]

    @property
    def scales(self) -> list[float]:
        """``1/√N_i``."""
        return [1.0 / math.sqrt(max(len(x), 1)) for x in self.rows]

    def places(self) -> list[slice]:
        """Of the rows of each among those of all."""
        ends = list(itertools.accumulate(len(x) for x in self.rows))
        return [slice(end - len(x), end) for end, x in zip(ends, self.rows, strict=True)]

    def weights(self, t: int, mu: float) -> list[float]:
        """What the rows of each are multiplied with in ``Y``: ``1/√N_t`` of the own ones, ``√(μ/N_j)`` of others."""
        return [s * (1.0 if i == t else math.sqrt(mu)) for i, s in enumerate(self.scales)]

    def over_rows(self, numbers: Sequence[float]) -> Tensor:
        """A number of each as one of every row: ``[N]``."""
        counts = torch.tensor([len(x) for x in self.rows])
        return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(counts)

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

    def operator(self, t: int, mu: float) -> Tensor:
        """``YYᵀ`` or ``YᵀY``, whichever is the smaller, with the weights of an adapter; a new matrix."""
        if self.gram is not None:
            d = self.over_rows(self.weights(t, mu))
            return (self.gram * d).mul_(d[:, None])
        total = self.whole_covariance() * mu
        return total if mu == 1.0 else total.add_(self.own_covariance(t), alpha=1.0 - mu)


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """``A'`` of one adapter in one module, whose own inputs are those at position ``t`` of the site.

    ``own``: ``A Y_tᵀ [r, N_t]``. ``solved``: ``[A Y_tᵀ, 0](YYᵀ + εI)⁻¹ [r, N]``, or ``A' [r, m]`` where the rows are
    more than the columns. ``square``: ``s²BᵀB``. ``norm``: ``‖ΔW‖``, to whose rounding ``A'`` is known.
    """

    site: Site
    t: int
    mu: float
    epsilon: float
    own: Tensor
    solved: Tensor
    square: Tensor
    norm: float

    @property
    def right(self) -> Factor:
        """``A'``: a sum over the stored rows, or one float64 matrix where the rows are more than the columns."""
        site = self.site
        if site.gram is None:
            return Factor.of("A", self.solved)
        parts = torch.split_with_sizes(self.solved, [len(x) for x in site.rows], 1)
        weighted = zip(site.rows, parts, site.weights(self.t, self.mu), strict=True)
        terms = tuple(Term(x, part, 0, weight) for x, part, weight in weighted if len(x) and weight)
        return Factor("A", site.width, len(self.solved), terms)

    @property
    def kept(self) -> float:
        """``‖X‖`` of the unique part."""
        if self.site.gram is None:
            inner = self.solved @ self.solved.mT
        else:  # Z YYᵀ Zᵀ with Z(YYᵀ + εI) = [A Y_tᵀ, 0]
            inner = self.own @ self.solved[:, self.site.places()[self.t]].mT
            inner -= self.epsilon * (self.solved @ self.solved.mT)
        return math.sqrt(max(float((self.square * inner).sum()), 0.0))


def complement(update: Update, filtered: Factor) -> Factor:
    """``A − A'``."""
    return add([update.A, filtered.scaled(-1.0)])


def solved(
    site: Site, products: Sequence[tuple[int, Tensor]], mu: float, ridge: float
) -> list[tuple[Tensor, Tensor, float]]:
    """``own``, ``solved`` and ``ε`` of filters (:class:`Filter`) at one site, from ``A X_tᵀ [r, N_t]`` and the position
    ``t`` of each.

    One matrix is factored for every adapter; for ``μ = 1`` it is the same one for all.

    Raises :class:`InputError` for a ridge that rounding hides.
    """
    groups: dict[int, list[int]] = {}
    for i, (t, _) in enumerate(products):
        groups.setdefault(0 if mu == 1.0 else t, []).append(i)
    found: dict[int, tuple[Tensor, Tensor, float]] = {}
    for members in groups.values():
        matrix = site.operator(products[members[0]][0], mu)
        epsilon = ridge * float(matrix.diagonal().sum()) / site.width
        own = [products[i][1] * site.scales[products[i][0]] for i in members]
        right = torch.zeros(sum(len(x) for x in own), len(matrix), dtype=torch.float64)
        rows = torch.split_with_sizes(right, [len(x) for x in own])
        if epsilon > 0.0:
            matrix.diagonal().add_(epsilon)
            places = site.places()
            for i, mine, row in zip(members, own, rows, strict=True):
                t = products[i][0]
                if site.gram is None:
                    torch.matmul(mine, site.rows[t].double() * site.scales[t], out=row)
                else:
                    row[:, places[t]] = mine
            rows = torch.split_with_sizes(_divided(right, matrix, ridge), [len(x) for x in own])
        found |= {i: (mine, row, epsilon) for i, mine, row in zip(members, own, rows, strict=True)}
    return [found[i] for i in range(len(products))]


def _divided(right: Tensor, matrix: Tensor, ridge: float) -> Tensor:
    """``R M⁻¹`` for a symmetric positive definite ``M``."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise InputError(
            f"ridge={ridge:g} is lost in the rounding of the inputs' products; give a larger one, such as 1e-8"
        )
    half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
    whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return whole.contiguous()
