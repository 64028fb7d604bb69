"""``ΔW = s·B·A`` of one module in two factors, and what follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastlora.core.dtypes import WIDTHS
from fastlora.core.factors import Factor, Side, source_key
from fastlora.errors import InputError


@dataclass(frozen=True, slots=True)
class Layout:
    """How a module's factors lie in a file; in memory they are always ``B [out, r]`` and ``A [r, in]``.

    ``linear``: as they are. ``embedding``: ``A [r, vocabulary]``, ``B [dim, r]``, and ``ΔW [dim, vocabulary]``.
    ``conv``: ``A [r, in, *kernel]``, flattened to ``[r, in·Πkernel]``. ``expert``: expert ``expert`` of ``experts``
    of the parameter ``container`` (mixture-of-experts parameters adapted through ``target_parameters``).

    ``order``, of experts: ``out-in`` is ``ΔW [out, in]``, as of every module. ``older`` was saved by a version of PEFT
    that laid some transposed, and ``unsaid`` by an unknown one, and shapes do not tell (:mod:`fastlora.core.experts`).
    """

    kind: Literal["linear", "embedding", "conv", "expert"] = "linear"
    kernel: tuple[int, ...] = ()
    container: str = ""
    expert: int = 0
    experts: int = 1
    order: Literal["out-in", "older", "unsaid"] = "out-in"


LINEAR, EMBEDDING = Layout(), Layout("embedding")


# Of what an update was computed from: the root of the rounding of a Gram matrix is 1e-8 of it, and a few of these.
ROUNDING = 1e-7


class Noise(NamedTuple):
    """What is known of the rounding in an update: nothing of a loaded one, whose numbers are exact.

    ``floor``: singular values of ``ΔW`` at or below it were not significant in what it was computed from, by the cut
    of that decomposition. ``origin``: the largest singular value of what it was computed from; the arithmetic left
    rounding of a small share of that (:data:`ROUNDING`). Both in units of ``ΔW``.
    """

    floor: float = 0.0
    origin: float = 0.0

    def scaled(self, weight: float) -> Noise:
        """That of ``weight · ΔW``."""
        return Noise(self.floor * abs(weight), self.origin * abs(weight))

    @property
    def rounding(self) -> float:
        """Singular values at or below it are rounding of the arithmetic."""
        return ROUNDING * self.origin


NO_NOISE = Noise()


def joint_noise(noises: Iterable[Noise]) -> Noise:
    """That of a sum: the largest of each."""
    floors, origins = zip(*noises, strict=True)
    return Noise(max(floors), max(origins))


@dataclass(slots=True, eq=False)
class Update:
    """``ΔW = scaling · B · A`` of one module, ``[out, in]``; ``noise``: what is known of its rounding."""

    B: Factor
    A: Factor
    scaling: float = 1.0
    layout: Layout = LINEAR
    noise: Noise = NO_NOISE

    def __post_init__(self) -> None:
        if self.B.rank != self.A.rank:
            raise InputError(
                f"the factors of an update do not fit: B is {list(self.B.shape)} and A {list(self.A.shape)}; needed "
                "are [out, rank] and [rank, in] of one rank"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of ``ΔW``."""
        return self.B.length, self.A.length

    @property
    def rank(self) -> int:
        """Columns of ``B``, at least the rank of ``ΔW``."""
        return self.B.rank

    def baked(self) -> Update:
        """The same update with scaling 1: the scaling moves into ``B``."""
        if self.scaling == 1.0:
            return self
        return Update(self.B.scaled(self.scaling), self.A, 1.0, self.layout, self.noise)

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the stored matrices."""
        return {t.source.dtype for f in (self.B, self.A) for t in f.terms}


def tensors(update: Update) -> list[Tensor]:
    """Matrices and coefficients, those of ``B`` first."""
    return [x for f in (update.B, update.A) for t in f.terms for x in (t.source, t.coefficient) if x is not None]


def distinct(updates: Iterable[Update]) -> dict[object, Tensor]:
    """The matrices and coefficients of some updates by identity, each once; those of ``B`` first."""
    tensor_by_key: dict[object, Tensor] = {}
    for side in ("B", "A"):
        for update in updates:
            for term in (update.B if side == "B" else update.A).terms:
                for tensor in (term.source, term.coefficient):
                    if tensor is not None:
                        tensor_by_key.setdefault(source_key(tensor), tensor)
    return tensor_by_key


def replaced(update: Update, tensor_by_key: dict[object, Tensor]) -> Update:
    """The update on other tensors, by the identity of its own."""
    return replace(update, B=_factor(update.B, tensor_by_key), A=_factor(update.A, tensor_by_key))


def _factor(factor: Factor, tensor_by_key: dict[object, Tensor]) -> Factor:
    terms = tuple(
        replace(
            t,
            source=tensor_by_key[source_key(t.source)],
            coefficient=None if t.coefficient is None else tensor_by_key[source_key(t.coefficient)],
        )
        for t in factor.terms
    )
    return replace(factor, terms=terms)


def sources(updates: Iterable[Update]) -> list[Tensor]:
    """Every stored matrix behind some updates."""
    return [t.source for u in updates for f in (u.B, u.A) for t in f.terms]


def zero_factors(name: str, updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Rank-1 zeros for the first module of adapter ``name``, so that an empty result can be loaded."""
    for module, update in updates.items():
        n, m = update.shape
        return {module: (torch.zeros(n, 1, dtype=dtype), torch.zeros(1, m, dtype=dtype))}
    raise InputError(f"adapter {name!r} has no modules, so there is nothing to write")


def with_rank_zero(update: Update) -> Update:
    """An update of the same module that is zero."""
    left, right = Factor("B", update.B.length, 0, ()), Factor("A", update.A.length, 0, ())
    return Update(left, right, 1.0, update.layout, update.noise)


def with_rank(update: Update, rank: int) -> Update:
    """The same ``ΔW`` at a higher rank: the columns of ``B`` and rows of ``A`` that are added are zero."""
    return (
        update
        if update.rank == rank
        else replace(update, B=replace(update.B, rank=rank), A=replace(update.A, rank=rank))
    )


def chosen_rank(updates: Iterable[Update], uniform_rank: int | bool | None) -> int | None:
    """What ``uniform_rank`` stands for: ``True`` is the largest rank of all, at least 1; a number must be that or
    more; ``None`` and ``False`` are none."""
    if uniform_rank is None or uniform_rank is False:
        return None
    most = max([1, *[u.rank for u in updates]])
    rank = most if uniform_rank is True else uniform_rank
    if rank < most:
        raise InputError(f"uniform_rank={uniform_rank}: the adapter has rank {most}; compress it, or give {most}")
    return rank


# The least relative size of a singular value that is a direction and not rounding; MATH section 2.
MIN_RTOL = 1e-6

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in WIDTHS}


def default_rtol(updates: Sequence[Update]) -> float:
    """The relative rounding of the coarsest dtype among the stored factors, 1e-6 at the least.

    Rounding a factor with relative error ε moves singular values by at most about ε·σ_max, whatever its size, so what
    lies below is not known from the file: float32 1e-6, float16 9.8e-4, bfloat16 7.8e-3.
    """
    return max([MIN_RTOL, *[EPSILON[t.source.dtype] for u in updates for f in (u.B, u.A) for t in f.terms]])


# The same for half-precision factors on a GPU, whose tensor cores sum inner products to 2⁻²⁹ of ‖x‖‖y‖ at the worst:
# a σ² at the floor is known to 2⁻²⁹ / 2⁻²⁴.
TENSOR_CORE_RTOL = 2.0**-12


def exact_rtol(updates: Sequence[Update], *, on_gpu: bool = False) -> float:
    """The relative size of a singular value that is rounding where stored numbers are taken as exact.

    ``on_gpu``: the factors will be computed with there, wherever they are now.
    """
    for update in updates:
        for terms in (update.B.terms, update.A.terms):
            for term in terms:
                if (on_gpu or not term.source.is_cpu) and term.source.element_size() == 2:
                    return TENSOR_CORE_RTOL
    return MIN_RTOL


def sides(side: str) -> tuple[Side, Side]:
    """(projected factor, other factor) of a decomposition side."""
    if side == "left":
        return "B", "A"
    if side == "right":
        return "A", "B"
    raise InputError(f"side={side!r} does not exist: use 'left' (column spaces, the paper) or 'right' (row spaces)")


def factor(update: Update, side: Side) -> Factor:
    """``B`` or ``A`` of an update, by its letter."""
    return update.B if side == "B" else update.A


def unscaled(floor: float, update: Update) -> float:
    """A floor of ``ΔW`` in units of the singular values of ``BA``; above all of them for a scaling of 0."""
    return floor / abs(update.scaling) if update.scaling else math.inf
