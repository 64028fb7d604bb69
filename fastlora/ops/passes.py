"""What the engine asks of a backend: streaming passes over ragged lists of factors, used where they lie.

These are the ops ``gram`` and ``combine`` without padding or copying; they are private to the engine and no torch
operators. There are thousands of entries in a pass over a model, so they are plain and light.

``dispatch.run("gram_pass", jobs)`` and ``dispatch.run("combine_pass", jobs)`` run a pass once. On Triton (both) and the
CPU (``combine_pass``) they have a prepared form: ``dispatch.prepared("gram_pass", jobs)`` checks the jobs and builds
their tables of addresses, and ``run()`` launches the kernels on what the factors hold by then. On a device it allocates
nothing and waits for nothing, so that a CUDA graph can hold it. The tensors must stay where they are. On the CPU
``renew()`` looks at the scales of terms and the places in files again, so that jobs may change in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BlockPlace = tuple[int, int, int]
"""``(i, j, offset)``: the block ``X_iᵀX_j`` and where it starts in :attr:`GramJob.out`, in elements."""

CombineTerm = tuple[int, Tensor | None, int, float]
"""``(factor, C, at, scale)``: ``out[:, at:at+q] += scale · X C`` (B side) or ``out[at:at+q] += scale · C X`` (A side).

``X = factors[factor]``; ``C`` is float64 with contiguous rows, ``[r, q]`` (B side) or ``[q, r]`` (A side), or ``None``
for the identity.
"""


@dataclass(slots=True, eq=False)
class GramJob:
    """Gram blocks of one module and side. ``factors``: B sides ``[n, r_i]``, or A sides ``[r_i, n]`` with ``rows``.

    Blocks ``[r_i, r_j]`` are put into the contiguous float64 ``out`` from element ``start`` on, with ``stride``
    elements between their rows. Jobs that share one ``blocks`` list are cheaper to hand over.
    """

    factors: Sequence[Tensor]
    blocks: Sequence[BlockPlace]
    rows: bool
    out: Tensor
    stride: int
    start: int = 0

    def block(self, block: BlockPlace) -> Tensor:
        """A block as a view of ``out``."""
        i, j, offset = block
        r = 0 if self.rows else 1
        shape = self.factors[i].shape[r], self.factors[j].shape[r]
        return self.out.view(-1).as_strided(shape, (self.stride, 1), self.start + offset)


@dataclass(slots=True, eq=False)
class CombineOutput:
    """A result of a combine pass, in memory (``out``) or in an open file, or a stored matrix that goes to a file.

    ``file``: descriptor, written at ``offset``; ``check`` refuses NaN and Inf. ``out`` with a file is what is written,
    as it is and without terms; ``None`` with a file is computed and kept nowhere else. ``present``: an int64 element
    beside the factors that is zero where every coefficient is; then the result is zeros, and a kernel need not read the
    factors.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    terms: Sequence[CombineTerm]
    out: Tensor | None = None
    file: int = -1
    offset: int = 0
    check: bool = False
    present: Tensor | None = None

    @staticmethod
    def into(out: Tensor, terms: Sequence[CombineTerm]) -> CombineOutput:
        """A result in memory."""
        return CombineOutput((out.shape[0], out.shape[1]), out.dtype, terms, out)

    @staticmethod
    def copy(stored: Tensor, file: int, offset: int, check: bool) -> CombineOutput:
        """A stored matrix, written as it is."""
        return CombineOutput((stored.shape[0], stored.shape[1]), stored.dtype, (), stored, file, offset, check)


@dataclass(slots=True, eq=False)
class CombineJob:
    """Results of one module and side that share factors; rows as in :class:`GramJob`."""

    factors: Sequence[Tensor]
    outputs: Sequence[CombineOutput]
    rows: bool


class SumOfTerms(Protocol):
    """What ``factor_pass`` and ``gram_factors`` read of a :class:`fastlora.core.factors.Factor`."""

    @property
    def side(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def terms(self) -> Sequence[object]: ...
    @property
    def stored(self) -> Tensor | None: ...


GramAsked = tuple[Sequence[Sequence[SumOfTerms]], Tensor, int, Sequence[BlockPlace]]
"""``(modules, out, r, blocks)`` for ``gram_factors``: blocks of the factors of every module, in rows of ``r``, in its
part of ``out``, whose memory holds nothing yet. It returns whether it computed them, which it does where all factors
are stored matrices, alone or side by side and scaled, that belong together; else a ``gram_pass`` does it, by the jobs
that :class:`fastlora.engine.gram.GramPass` makes."""

FactorSide = tuple[Sequence[SumOfTerms], Sequence[Tensor]]
"""``(factors, results)`` of one side of one module: what ``factor_pass`` computes in memory, as a ``combine_pass`` does
from the jobs that :func:`fastlora.engine.combine_jobs.combine_job` makes. It returns whether it did, which it does
where the factors of a side belong together. A backend need not have it: it saves making jobs, which for small matrices
takes longer than computing them."""


@dataclass(frozen=True, slots=True)
class WriteProblem:
    """What stopped a combine pass that writes: the output (of ``job``), and the errno, or ``None`` for NaN or Inf."""

    job: int
    output: int
    errno: int | None
