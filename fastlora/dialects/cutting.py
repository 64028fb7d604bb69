"""Fused projections in parts and parts fused, exactly; and modulations whose halves are in the other order.

``W = [W_1; W_2; …]`` has the rows of its parts one after another. A part of an update has rows of ``B`` and all of
``A``. Where ``B`` is block-diagonal, as that of parts that were put together, a part has a block of ``B`` and its own
rows of ``A``, and so its own rank again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastlora.core.factors import Factor, Term
from fastlora.core.fusing import rows
from fastlora.core.updates import Update, joint_noise


def split(update: Update, counts: Sequence[int]) -> list[Update]:
    """The parts of an update that have ``counts`` rows, on views of its stored matrices."""
    stops = list(accumulate(counts))
    starts = [stop - count for stop, count in zip(stops, counts, strict=True)]
    pieces = _blocks(update, list(zip(starts, stops, strict=True)))
    if pieces is not None:
        return pieces
    return [rows(update, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _blocks(update: Update, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """The parts by blocks of ``B``; ``None`` where it is not block-diagonal."""
    left, right = update.B.joined, update.A.joined
    if not left or not right or [t.at for t in left] != [t.at for t in right]:
        return None
    found: list[list[tuple[int, int]]] = []
    for term in left:
        columns = _columns(term.source, spans)
        if columns is None:
            return None
        found.append(columns)
    parts = []
    for i, (start, stop) in enumerate(spans):
        B, A, at = list[Term](), list[Term](), 0
        for b, a, columns in zip(left, right, found, strict=True):
            first, last = columns[i]
            if last > first:
                B.append(Term(b.source[start:stop, first:last], None, at, b.scale))
                A.append(Term(a.source[first:last], None, at, a.scale))
                at += last - first
        parts.append(
            replace(
                update,
                B=Factor("B", stop - start, at, tuple(B)),
                A=Factor("A", update.A.length, at, tuple(A)),
            )
        )
    return parts


def _columns(B: Tensor, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The columns that each span of rows has for itself, ``(first, last + 1)``; ``None`` where spans share some.

    The first row of each span tells a matrix that is none from one that may be; only then the rest is read.
    """
    if len(spans) < 2 or _overlap([_extent(B[start : start + 1]) for start, _ in spans]):
        return None
    extents = [_extent(B[start:stop]) for start, stop in spans]
    return None if _overlap(extents) else extents


def _extent(B: Tensor) -> tuple[int, int]:
    """From the first to behind the last column that is not zero."""
    used = (B != 0).any(0).nonzero()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)


def _overlap(extents: Sequence[tuple[int, int]]) -> bool:
    taken = sorted(e for e in extents if e[1] > e[0])
    return any(one[1] > other[0] for one, other in pairwise(taken))


def is_even(update: Update, counts: Sequence[int]) -> bool:
    """Whether ``B`` is block-diagonal with blocks of equal rank, where the reader of diffusers cuts the rank too."""
    n, rank = len(counts), update.rank
    if rank % n:
        return False
    if not update.B.terms:
        return True
    left = update.B.joined
    if left is None or len(left) != 1:
        return False  # computed: dense, but for numbers that cancel to the last bit
    stops = list(accumulate(counts))
    source, share = left[0].source, rank // n
    for depth in (1, max(counts)):  # a row of each part tells most; only then the rest is read
        for i, (stop, count) in enumerate(zip(stops, counts, strict=True)):
            part = source[stop - count : stop - count + min(depth, count)]
            if bool((part[:, : i * share] != 0).any()) or bool((part[:, (i + 1) * share :] != 0).any()):
                return False
    return True


def joined_by_input(parts: Sequence[Update]) -> Update | None:
    """Parts that have one ``A`` and one scaling as the update of the fused weight, of the same rank; ``None`` where
    they have not. The stored matrices of ``B`` are copied, one below another."""
    first = parts[0]
    if len(parts) < 2 or any(p.scaling != first.scaling or p.layout != first.layout for p in parts):
        return None
    if any(not _same_terms(p.A, first.A, with_sources=True) for p in parts):
        return None
    if any(not _same_terms(p.B, first.B, with_sources=False) for p in parts):
        return None
    terms = tuple(
        replace(t, source=torch.cat([p.B.terms[i].source for p in parts])) for i, t in enumerate(first.B.terms)
    )
    B = replace(first.B, length=sum(p.shape[0] for p in parts), terms=terms)
    return replace(first, B=B, noise=joint_noise(p.noise for p in parts))


def _same_terms(one: Factor, other: Factor, *, with_sources: bool) -> bool:
    if one is other:
        return True
    if one.rank != other.rank or len(one.terms) != len(other.terms) or not one.terms:
        return False
    return all(
        a.at == b.at
        and a.scale == b.scale
        and a.coefficient is None
        and b.coefficient is None
        and a.source.dtype == b.source.dtype
        and (not with_sources or _equal(a.source, b.source))
        for a, b in zip(one.terms, other.terms, strict=True)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and torch.equal(one[:1], other[:1]) and torch.equal(one, other)


def swapped_halves(update: Update) -> Update:
    """The update of a weight that has its two halves of rows in the other order: (shift, scale) for (scale, shift).
    The stored matrices of ``B`` are copied."""
    half = update.shape[0] // 2
    terms = tuple(replace(t, source=torch.cat([t.source[half:], t.source[:half]])) for t in update.B.terms)
    return replace(update, B=replace(update.B, terms=terms))


def widened(factor: Factor, rank: int, column: int) -> Factor:
    """``B`` in the columns from ``column`` on of a factor of ``rank``, whose other columns are zero."""
    if factor.rank == rank:
        return factor
    terms = tuple(replace(t, at=t.at + column) for t in factor.terms)
    return replace(factor, rank=rank, terms=terms)
