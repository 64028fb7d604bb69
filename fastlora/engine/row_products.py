"""Products with many rows of inputs, ``XXᵀ`` and ``A Xᵀ``: Gram passes over pieces of the rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.core.factors import Factor
from fastlora.engine.gram import GramPass
from fastlora.engine.gram_cache import run_through_cache
from fastlora.ops.dispatch import run_pass
from fastlora.ops.passes import GramJob

PIECE = 64
"""Rows that are multiplied together: two pieces and their sums stay in the cache."""


def row_grams(sites: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """``XXᵀ`` of every site, whose ``X [N, m]`` is some matrices below one another: float64 ``[N, N]``, symmetric.

    The matrices are read where they lie, in any floating dtype. Cost: ``N²·m`` operations a site in float64.
    """
    jobs, found = [], []
    for matrices in sites:
        pieces = _pieces(matrices)
        starts = [0, *itertools.accumulate(len(piece) for piece in pieces)]
        N = starts[-1]
        out = torch.zeros(N, N, dtype=torch.float64)
        found.append((out, starts))
        for i, left in enumerate(pieces):
            jobs.append(GramJob([left], [(0, 0, starts[i] * N + starts[i])], True, out, N))
            for j in range(i + 1, len(pieces)):
                jobs.append(GramJob([left, pieces[j]], [(0, 1, starts[i] * N + starts[j])], True, out, N))
    run_through_cache(jobs, functools.partial(run_pass, "gram_pass"))
    for out, starts in found:
        for start, end in itertools.pairwise(starts):
            out[end:, start:end] = out[start:end, end:].mT
    return [out for out, _ in found]


def products_with_rows(factors: Sequence[Sequence[Factor]], rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """``A_i X_gᵀ`` of some ``A`` sides for every ``X_g [N_g, m]`` of ``rows``: float64 ``[r_i, N_g]``.

    Cost: ``2·r_i·m·N_g`` operations each in float64; rows are read once for all factors they meet.
    """
    found: list[list[Tensor]] = [
        [torch.zeros(f.rank, len(x), dtype=torch.float64) if not (f.rank and len(x)) else x for f in some]
        for some, x in zip(factors, rows, strict=True)
    ]
    alike: dict[tuple[int, int], list[int]] = {}
    for g, (some, x) in enumerate(zip(factors, rows, strict=True)):
        count = sum(1 for f in some if f.rank)
        if count and len(x):
            alike.setdefault((count, -(-len(x) // PIECE)), []).append(g)
    grams = GramPass()
    asked = []
    for members in alike.values():
        mine = [[f for f in factors[g] if f.rank] for g in members]
        theirs = [[Factor.of("A", piece) for piece in _pieces([rows[g]])] for g in members]
        r = max(PIECE, *(f.rank for some in mine for f in some))
        asked.append((members, grams.products(mine, theirs, r)))
    grams.run()
    for members, blocks in asked:
        for g, of_module in zip(members, blocks.unbind(), strict=True):
            there = [i for i, factor in enumerate(factors[g]) if factor.rank]
            for i, pieces in zip(there, of_module.unbind(), strict=True):  # [pieces, r, r]
                rank, count = factors[g][i].rank, len(rows[g])
                if len(pieces) == 1:
                    found[g][i] = pieces[0, :rank, :count]
                else:
                    found[g][i] = pieces[:, :rank, :PIECE].transpose(0, 1).flatten(1)[:, :count]
    return found


def _pieces(matrices: Sequence[Tensor]) -> list[Tensor]:
    split = ([x] if len(x) <= PIECE else torch.split(x, PIECE) for x in matrices)
    return [piece for pieces in split for piece in pieces if len(piece)]
