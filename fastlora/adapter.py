"""Adapters as data: every module's update ``ΔW = s·B·A`` in factors that are not formed until they are needed.

A factor is kept as a linear combination of the matrices that were loaded. Methods only change the small
coefficients; the tall matrices are read once when a result is asked for or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastlora.errors import InputError
from fastlora.operators import Operators

Side = Literal["B", "A"]


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

    def matrix(self, side: Side, rank: int) -> Tensor:
        """The term's share of the coefficient of its source, scale included: float64 ``[r, rank]`` on both sides."""
        r = self.source.shape[1 if side == "B" else 0]
        where = self.source.device
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

    @staticmethod
    def of(side: Side, stored: Tensor) -> Factor:
        """The factor that is exactly one stored matrix."""
        n, r = stored.shape if side == "B" else (stored.shape[1], stored.shape[0])
        return Factor(side, n, r, (Term(stored),))

    @property
    def shape(self) -> tuple[int, int]:
        return (self.length, self.rank) if self.side == "B" else (self.rank, self.length)

    @property
    def stored(self) -> Tensor | None:
        """The stored matrix that this factor is, bit for bit, or ``None`` when it has to be computed."""
        if len(self.terms) != 1:
            return None
        term = self.terms[0]
        if term.coefficient is not None or term.scale != 1.0:
            return None
        return term.source if term.source.shape[1 if self.side == "B" else 0] == self.rank else None

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
        if weight == 1.0:
            return self
        terms = tuple(Term(t.source, t.coefficient, t.at, t.scale * weight) for t in self.terms)
        return Factor(self.side, self.length, self.rank, terms)

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
        return Factor(self.side, self.length, C.shape[1 - axis], tuple(terms))


def _on(source: Tensor, small: Tensor) -> Tensor:
    return small if small.device == source.device else small.to(source.device)


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


@dataclass(frozen=True, slots=True)
class Layout:
    """How a module's factors lie in a file; in memory they are always ``B [out, r]`` and ``A [r, in]``.

    ``linear``: as they are. ``embedding``: ``A [r, vocabulary]``, ``B [dim, r]``, and ``ΔW [dim, vocabulary]``.
    ``conv``: ``A [r, in, *kernel]``, flattened to ``[r, in·Πkernel]``. ``expert``: expert ``expert`` of ``experts``
    of the parameter ``container`` (mixture-of-experts parameters adapted through ``target_parameters``).
    """

    kind: Literal["linear", "embedding", "conv", "expert"] = "linear"
    kernel: tuple[int, ...] = ()
    container: str = ""
    expert: int = 0
    experts: int = 1


LINEAR, EMBEDDING = Layout(), Layout("embedding")


@dataclass(slots=True, eq=False)
class Update:
    """``ΔW = scaling · B · A`` of one module, ``[out, in]``.

    ``floor``: singular values of ``ΔW`` at or below it are rounding noise of what it was computed from
    (0 for a loaded update).
    """

    B: Factor
    A: Factor
    scaling: float = 1.0
    layout: Layout = LINEAR
    floor: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.length, self.A.length

    @property
    def rank(self) -> int:
        return self.B.rank

    def baked(self) -> Update:
        """The same update with scaling 1: the scaling moves into ``B``."""
        if self.scaling == 1.0:
            return self
        return Update(self.B.scaled(self.scaling), self.A, 1.0, self.layout, self.floor)

    def dtypes(self) -> set[torch.dtype]:
        return {t.source.dtype for f in (self.B, self.A) for t in f.terms}


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """A parameter of an adapter that is no ``[out, in]`` update.

    ``delta``: it is added to the base model's parameter (``lora_bias``), so it takes part in arithmetic.
    ``value``: it replaces the base model's parameter (``modules_to_save``, trained biases), whose change is unknown
    without the base model, so it can be kept but not combined.
    """

    kind: Literal["delta", "value"]
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What an adapter says about the model it belongs to; carried through every operation."""

    model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    layer_replication: tuple[tuple[int, int], ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"


class Adapter(Operators):
    """A low-rank adapter: one :class:`Update` per module of the base model, named by its path in it.

    Arithmetic is exact on ``ΔW``: ``0.7 * a + 0.3 * b - c`` concatenates factors (MATH section 4, *exact*) and
    computes nothing until the result is saved or looked at.
    """

    kind = "a LoRA adapter"

    def __init__(
        self,
        name: str,
        updates: Mapping[str, Update],
        *,
        extras: Mapping[str, Extra] | None = None,
        base: BaseInfo | None = None,
        dtype: torch.dtype = torch.float32,
        provenance: Mapping[str, object] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.updates = dict(updates)
        self.extras = dict(extras or {})
        self.base = base or BaseInfo()
        self.dtype = dtype
        self.provenance: dict[str, object] = dict(provenance or {"adapter": name})
        self.notes = list(notes)
        self.details: dict[str, object] = {}

    @property
    def modules(self) -> list[str]:
        """Module paths, in the order of the file."""
        return list(self.updates)

    @property
    def device(self) -> torch.device:
        """Where the matrices are: those of an adapter are together. An adapter without matrices is on the CPU."""
        terms = (t for u in self.updates.values() for t in (*u.B.terms, *u.A.terms))
        first = next(terms, None)
        return torch.device("cpu") if first is None else first.source.device

    def to(self, device: torch.device | str) -> Adapter:
        """The adapter on a device (``"cpu"``, ``"cuda"``, ``"cuda:1"``), by one copy; itself where it is there."""
        from fastlora import device as devices

        return devices.to(self, devices.parse(device) or self.device)

    def __contains__(self, module: str) -> bool:
        return module in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}" if ranks else "–"
        return f"Adapter({self.name!r}, {len(self.updates)} modules, rank {span}, {str(self.dtype)[6:]})"

    def update(self, module: str) -> Update:
        try:
            return self.updates[module]
        except KeyError:
            close = [m for m in self.updates if m.endswith(module.rsplit(".", 1)[-1])][:3]
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(
                f"adapter {self.name!r} has no module {module!r}{hint} (`.modules` lists all {len(self.updates)})"
            ) from None

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``(B [out, r], A [r, in])`` of one module in float32, the scaling inside ``B``."""
        from fastlora.engine import materialise

        return materialise([self.update(module).baked()], torch.float32)[0]

    def delta(self, module: str) -> Tensor:
        """Dense ``ΔW [out, in]`` of one module, float32, scaling included. For tests and small models."""
        left, right = self.factors(module)
        return (left.double() @ right.double()).float()

    def compress(self, rank: int | None = None, *, energy: float | None = None) -> Adapter:
        """The best approximation of every ``ΔW`` at a rank or a share of its energy: see :func:`fastlora.compress`."""
        from fastlora.api import compress

        return compress(self, rank=rank, energy=energy)

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: bool = False) -> Path:
        """Writes a PEFT directory, atomically. ``dtype=None`` keeps the widest dtype of the inputs."""
        from fastlora.engine import save_adapter

        return save_adapter(self, Path(path), dtype=dtype, overwrite=overwrite)

    def without_extras(self) -> Adapter:
        """The adapter's low-rank updates alone, without biases and replaced modules."""
        return Adapter(
            self.name,
            self.updates,
            base=replace(self.base, modules_to_save=(), bias="none"),
            dtype=self.dtype,
            provenance={"without_extras": self.provenance},
            notes=self.notes,
        )

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, Adapter]], name: str | None = None) -> Adapter:
        """``ΔW = Σ w_i ΔW_i``, exactly."""
        from fastlora.methods.arithmetic import combination

        return combination(terms, name)
