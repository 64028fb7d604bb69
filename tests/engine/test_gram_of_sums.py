"""Gram blocks of factors that are stored matrices side by side: the kernel puts them together as its jobs do."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian
from compiled import needs_kernels

from fastlora.core.factors import Factor, Term, concatenate
from fastlora.engine import gram
from fastlora.engine.gram import GramPass

PAIRS = [(0, 0), (0, 1), (1, 1), (2, 2)]
RANKS = [[3, 5], [4], [2, 1, 6]]  # of the stored matrices that each factor is made of
SCALES = [0.5, 1.0, -3.0]


def factors(side: str, seed: int) -> list[Factor]:
    def piece(r: int, at: int) -> Factor:
        shape = (37, r) if side == "B" else (r, 37)
        return Factor.of(side, gaussian(*shape, seed=seed + at)).scaled(SCALES[at % 3])  # type: ignore[arg-type]

    return [concatenate([piece(r, 7 * i + j) for j, r in enumerate(own)]) for i, own in enumerate(RANKS)]


@needs_kernels
@pytest.mark.parametrize("side", ["B", "A"])
def test_they_have_the_bits_of_their_jobs(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [factors(side, seed) for seed in (100, 200)]

    def found() -> torch.Tensor:
        grams = GramPass()
        blocks = grams.blocks(modules, 10, PAIRS)
        grams.run()
        return blocks

    direct = found()
    monkeypatch.setattr(gram, "shortcut", lambda *_: False)
    assert torch.equal(direct, found())
    whole = [[torch.cat([t.scale * (t.source if side == "B" else t.source.mT).double() for t in f.terms], 1)
              for f in own] for own in modules]  # fmt: skip
    for got, own in zip(direct, whole, strict=True):
        for i, j in PAIRS:
            wanted = own[i].mT @ own[j]
            torch.testing.assert_close(got[i, j, : wanted.shape[0], : wanted.shape[1]], wanted, rtol=1e-13, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("side", ["B", "A"])
def test_other_sums_are_left_to_their_jobs(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms in one place, with coefficients, or with room between them."""
    first, second, third = factors(side, 300)[0].terms[0].source, *[t.source for t in factors(side, 400)[0].terms]
    small = gaussian(3, 3, seed=1, dtype=torch.float64)
    taken: list[object] = []
    run = gram.run_pass
    monkeypatch.setattr(gram, "run_pass", lambda op, jobs: (taken.append(op), run(op, jobs))[1])
    for terms, rank in (
        ((Term(first), Term(second)), 3), ((Term(first, small),), 3), ((Term(first), Term(third, None, 4)), 9),
    ):  # fmt: skip
        factor = Factor(side, 37, rank, terms)  # type: ignore[arg-type]
        gram.read_gram([[factor]], rank, [(0, 0)])
    assert taken == ["gram_pass"] * 3
