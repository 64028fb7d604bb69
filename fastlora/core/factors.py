"""One side of an update: a sum of stored matrices, each times a small coefficient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fastlora.core.float64 import of_float64

Side = Literal["B", "A"]

_new = object.__new__


@dataclass(slots=True, eq=False)
class Term:
    """``scale · source · coefficient`` (B side) or ``scale · coefficient · source`` (A side), placed at ``at``.

    ``source`` is ``[n, r]`` (B side) or ``[r, m]`` (A side), in the dtype it was loaded with; ``coefficient`` is
    float64 ``[r, q]`` (B side) or ``[q, r]`` (A side), or ``None`` for the identity; ``at`` is the first column
    (B side) or row (A side) of the factor that it adds to.
    """

    source: Tensor
    coefficient: Tensor | None = None
    at: int = 0
    scale: float = 1.0

    def width(self, side: Side) -> int:
        """Columns (B side) or rows (A side) of the factor that this term covers."""
        if self.coefficient is None:
            return self.source.shape[1 if side == "B" else 0]
        return self.coefficient.shape[1 if side == "B" else 0]

    def stretched(self, side: Side, lengths: Tensor) -> Term:
        """The term with the columns (B side) or rows (A side) of its factor times ``lengths``, float64 ``[rank]``."""
        own = lengths[self.at : self.at + self.width(side)]
        if not len(own) or bool((own == own[0]).all()):
            return replace(self, scale=self.scale * float(own[0]) if len(own) else self.scale)
        own = own.to(of_float64(self.source.device))
        if self.coefficient is None:
            return replace(self, coefficient=torch.diag(own))
        return replace(self, coefficient=self.coefficient * (own if side == "B" else own[:, None]))

    def matrix(self, side: Side, rank: int) -> Tensor:
        """The term's share of the coefficient of its source, scale included: float64 ``[r, rank]`` on both sides."""
        r = self.source.shape[1 if side == "B" else 0]
        where = of_float64(self.source.device)
        full = torch.zeros(r, rank, dtype=torch.float64, device=where)
        block = torch.eye(r, dtype=torch.float64, device=where) if self.coefficient is None else self.coefficient
        if side == "A" and self.coefficient is not None:
            block = block.mT
        full[:, self.at : self.at + block.shape[1]] = self.scale * block
        return full


@dataclass(slots=True, eq=False)
class Factor:
    """One side of an update: ``B [length, rank]`` or ``A [rank, length]`` as a sum of terms."""

    side: Side
    length: int
    rank: int
    terms: tuple[Term, ...]
    stored: Tensor | None = field(init=False, repr=False)
    """The stored matrix that this factor is, bit for bit, or ``None`` when it has to be computed."""

    def __post_init__(self) -> None:
        self.stored = None
        if len(self.terms) == 1:
            term = self.terms[0]
            if term.coefficient is None and term.scale == 1.0:
                if term.source.shape[1 if self.side == "B" else 0] == self.rank:
                    self.stored = term.source

    @staticmethod
    def of(side: Side, stored: Tensor, shape: Sequence[int] | None = None) -> Factor:
        """The factor that is exactly one stored matrix; ``shape``: of that, where it is known."""
        factor = _new(Factor)  # a pool of hundreds has thousands, and nothing is left to find out
        factor.side, factor.terms, factor.stored = side, (Term(stored),), stored
        shape = stored.shape if shape is None else shape
        if side == "B":
            factor.length, factor.rank = shape
        else:
            factor.rank, factor.length = shape
        return factor

    @staticmethod
    def of_terms(side: Side, length: int, rank: int, terms: tuple[Term, ...]) -> Factor:
        """The factor of terms that are known to be no stored matrix as it is."""
        factor = _new(Factor)
        factor.side, factor.length, factor.rank, factor.terms, factor.stored = side, length, rank, terms, None
        return factor

    @property
    def shape(self) -> tuple[int, int]:
        """``[length, rank]`` (B side) or ``[rank, length]`` (A side)."""
        return (self.length, self.rank) if self.side == "B" else (self.rank, self.length)

    @property
    def joined(self) -> tuple[Term, ...] | None:
        """The terms if the factor is stored matrices side by side, each times its scale, else ``None``."""
        axis = 1 if self.side == "B" else 0
        end = 0
        for term in self.terms:
            if term.coefficient is not None or term.at != end:
                return None
            end += term.source.shape[axis]
        return self.terms if end == self.rank else None

    def scaled(self, weight: float) -> Factor:
        """The factor times ``weight``; no matrix is computed."""
        if weight == 1.0:
            return self
        terms = tuple(Term(t.source, t.coefficient, t.at, t.scale * weight) for t in self.terms)
        return Factor(self.side, self.length, self.rank, terms)

    def stretched(self, lengths: Tensor) -> Factor:
        """The factor with its columns (B side) or rows (A side) times ``lengths``, float64 ``[rank]``; no matrix is
        computed."""
        return Factor(self.side, self.length, self.rank, tuple(t.stretched(self.side, lengths) for t in self.terms))

    def coefficients(self) -> list[tuple[Tensor, Tensor]]:
        """``(source, C)`` for every distinct source, with float64 ``C [r, rank]``: the factor is ``Σ source · C``
        (B side) or its transpose ``Σ sourceᵀ · C`` (A side)."""
        merged: dict[tuple[int, int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        for term in self.terms:
            key = source_key(term.source)
            matrix = term.matrix(self.side, self.rank)
            merged[key] = (term.source, merged[key][1] + matrix if key in merged else matrix)
        return list(merged.values())

    def times(self, small: Tensor) -> Factor:
        """``B · small`` or ``smallᵀ · A`` for a float64 ``small [rank, q]``."""
        return self.applied(small if self.side == "B" else small.mT)

    def applied(self, C: Tensor) -> Factor:
        """``B C`` or ``C A``: a float64 coefficient as terms have them, ``[rank, q]`` (B side) or ``[q, rank]``."""
        return Factor(self.side, self.length, C.shape[1 if self.side == "B" else 0], self.terms_on(C))

    def terms_on(self, C: Tensor) -> tuple[Term, ...]:
        """Those of :meth:`applied`."""
        stored = self.stored
        if stored is not None and stored.is_cpu and C.is_cpu:
            return (Term(stored, C if C.stride(1) == 1 else C.contiguous()),)
        axis = 0 if self.side == "B" else 1  # of the rank
        joined = self.joined
        if self.terms:
            C = _with_contiguous_rows(_on(self.terms[0].source, C))
        if joined is None:
            terms = [
                Term(source, coefficient @ C if axis == 0 else _with_contiguous_rows(C @ coefficient.mT))
                for source, coefficient in self.coefficients()
            ]
        elif len(joined) == 1:
            terms = [Term(joined[0].source, C, 0, joined[0].scale)]
        else:
            pieces = torch.split_with_sizes(C, [t.source.shape[1 - axis] for t in joined], axis)
            terms = [Term(t.source, piece, 0, t.scale) for t, piece in zip(joined, pieces, strict=True)]
        return tuple(terms)


def _on(source: Tensor, small: Tensor) -> Tensor:
    """Float64 beside a stored matrix."""
    device = of_float64(source.device)
    return small if small.device == device else small.to(device)


def _with_contiguous_rows(small: Tensor) -> Tensor:
    return small if small.stride(1) == 1 else small.contiguous()


def source_key(source: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Identity of a stored matrix: two views of one piece of memory are one source."""
    return source.data_ptr(), source.element_size(), tuple(source.shape) + source.stride()


def add(factors: Iterable[Factor]) -> Factor:
    """The sum of factors of one side, length and rank."""
    items = list(factors)
    first = items[0]
    return Factor(first.side, first.length, first.rank, tuple(t for f in items for t in f.terms))


def concatenate(factors: Sequence[Factor]) -> Factor:
    """``[B_1 | B_2 | …]`` or ``[A_1; A_2; …]``."""
    terms = list(factors[0].terms)
    rank = factors[0].rank
    for factor in factors[1:]:
        terms += [Term(t.source, t.coefficient, t.at + rank, t.scale) for t in factor.terms]
        rank += factor.rank
    return Factor(factors[0].side, factors[0].length, rank, tuple(terms))


SIDES: tuple[Side, Side] = ("B", "A")


def device_of(modules: Sequence[Sequence[Factor]]) -> torch.device:
    """Where the factors are: those of a pool are together."""
    return next((t.source.device for factors in modules for f in factors for t in f.terms), torch.device("cpu"))
