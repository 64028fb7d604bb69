"""Gram blocks of the factors of modules, in one pass over the matrices that they are made of."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastlora.adapter import Factor, Term, source_key
from fastlora.backends.passes import GramBlock, GramJob
from fastlora.engine import device_of, run_pass
from fastlora.gramcache import run_gram

Pairs = Sequence[tuple[int, int]]


def gram_blocks(modules: Sequence[Sequence[Factor]], r: int, pairs: Pairs) -> Tensor:
    """Gram blocks of the ``k`` factors of each module, all of one side.

    Returns float64 ``[len(modules), k, k, r, r]``, zero-padded to ``r``, with the blocks of ``pairs`` filled.
    """
    k = len(modules[0])
    out = torch.zeros(len(modules), k, k, r, r, dtype=torch.float64, device=device_of(modules))
    _put_gram_blocks(modules, out, k * k * r * r, r, [(i, j, (i * k + j) * r * r) for i, j in pairs])
    return out


def gram_diagonal(modules: Sequence[Sequence[Factor]], r: int) -> Tensor:
    """The diagonal blocks of :func:`gram_blocks` alone: ``[len(modules), k, r, r]``."""
    k = len(modules[0])
    out = torch.zeros(len(modules), k, r, r, dtype=torch.float64, device=device_of(modules))
    _put_gram_blocks(modules, out, k * r * r, r, [(i, i, i * r * r) for i in range(k)])
    return out


def _put_gram_blocks(
    modules: Sequence[Sequence[Factor]], out: Tensor, size: int, r: int, places: Sequence[GramBlock]
) -> None:
    """Blocks ``(i, j)`` of every module into ``out``: ``size`` elements a module, rows of ``r``, at their offsets."""
    jobs, joined, pending = [], [], []
    layouts: dict[tuple[tuple[int, ...], ...], list[GramBlock]] = {}
    for m, factors in enumerate(modules):
        rows = factors[0].side == "A"
        pieces = [f.joined for f in factors]
        if any(p is None for p in pieces):
            job, coefficients = _source_gram(factors, rows)
            jobs.append(job)
            pending.append((m, coefficients, job.out))
            continue
        terms = [t for p in pieces for t in cast(tuple[Term, ...], p)]
        if len(terms) == len(factors):
            blocks = places
        else:
            axis = 0 if rows else 1
            widths = tuple(tuple(t.source.shape[axis] for t in f.terms) for f in factors)
            if widths not in layouts:
                layouts[widths] = _pieces_of(widths, r, places)
            blocks = layouts[widths]
        jobs.append(GramJob([t.source for t in terms], blocks, rows, out, r, m * size))
        if blocks is not places or any(t.scale != 1.0 for t in terms):
            joined.append((m, factors))
    run_gram(jobs, functools.partial(run_pass, "gram_pass"))
    if joined:
        _finish_joined(joined, out.view(len(modules), size), r, places)
    for m, coefficients, block in pending:
        full = block.triu() + block.triu(1).mT
        for i, j, offset in places:
            (at, left), (to, right) = coefficients[i], coefficients[j]
            shape = left.shape[1], right.shape[1]
            out.view(-1).as_strided(shape, (r, 1), m * size + offset).copy_(left.mT @ full[at][:, to] @ right)


def _pieces_of(widths: Sequence[Sequence[int]], r: int, places: Sequence[GramBlock]) -> list[GramBlock]:
    """Blocks of factors as blocks of the stored matrices that they are made of; of a block on the diagonal the upper
    ones. ``widths``: columns of the stored matrices of each factor."""
    first = [0, *itertools.accumulate(len(own) for own in widths)]
    starts = [[0, *itertools.accumulate(own)] for own in widths]
    return [
        (first[i] + a, first[j] + b, offset + starts[i][a] * r + starts[j][b])
        for i, j, offset in places
        for a in range(len(widths[i]))
        for b in range(a if i == j else 0, len(widths[j]))
    ]


def _finish_joined(
    joined: Sequence[tuple[int, Sequence[Factor]]], out: Tensor, r: int, places: Sequence[GramBlock]
) -> None:
    """Mirrors the blocks on the diagonal and applies the scales of stored matrices: ``out [modules, size]``."""
    modules = slice(None) if len(joined) == len(out) else [m for m, _ in joined]
    scales = None
    if any(t.scale != 1.0 for _, factors in joined for f in factors for t in f.terms):
        rows = [[_column_scales(f, r) for f in factors] for _, factors in joined]
        scales = torch.tensor(rows, dtype=torch.float64).to(out.device)
    upper = torch.ones(r, r, dtype=torch.bool, device=out.device).triu()
    for i, j, offset in places:
        if i != j and scales is None:
            continue
        block = out[modules, offset : offset + r * r].reshape(-1, r, r)
        if i == j:
            block = torch.where(upper, block, block.mT)
        if scales is not None:
            block = scales[:, i, :, None] * block * scales[:, j, None]
        out[modules, offset : offset + r * r] = block.flatten(1)


def _column_scales(factor: Factor, r: int) -> list[float]:
    """The scale of every column (B side) or row (A side) of a factor of stored matrices, ones up to ``r``."""
    scales = [t.scale for t in factor.terms for _ in range(t.width(factor.side))]
    return scales + [1.0] * (r - len(scales))


def _source_gram(factors: Sequence[Factor], rows: bool) -> tuple[GramJob, list[tuple[Tensor, Tensor]]]:
    """The Gram matrix of the distinct stored matrices behind some factors, and each factor's coefficients on them.

    The coefficients are ``(index, C)``: ``C`` belongs to the rows ``index`` of the Gram matrix. The others are left out
    and not multiplied by zero, so that NaN or Inf in one adapter is not found in another.
    """
    places: dict[object, int] = {}
    sources: list[Tensor] = []
    total = 0
    for factor in factors:
        for term in factor.terms:
            if source_key(term.source) not in places:
                places[source_key(term.source)] = total
                sources.append(term.source)
                total += term.source.shape[0 if rows else 1]
    coefficients = []
    device = sources[0].device if sources else torch.device("cpu")
    for factor in factors:
        own = factor.coefficients()
        index = [torch.arange(c.shape[0], device=device) + places[source_key(source)] for source, c in own]
        stacked = [c for _, c in own]
        coefficients.append(
            (torch.cat(index), torch.cat(stacked))
            if own
            else (
                torch.zeros(0, dtype=torch.int64, device=device),
                torch.zeros(0, factor.rank, dtype=torch.float64, device=device),
            )
        )
    starts = [places[source_key(s)] for s in sources]
    blocks = [(i, j, starts[i] * total + starts[j]) for i in range(len(sources)) for j in range(i, len(sources))]
    gram = torch.zeros(total, total, dtype=torch.float64, device=device)
    return GramJob(sources, blocks, rows, gram, total), coefficients
