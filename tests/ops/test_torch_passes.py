"""The passes of plain torch: jobs of several kinds on several threads, each with memory that it uses again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian
from tolerances import FLOAT64, SUMS32
from torch import Tensor

from fastlora.backends import torch_combine, torch_gram, torch_slabs
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm, GramJob, WriteProblem

pytestmark = pytest.mark.portable

KINDS = [(40, (5, 5, 5, 5)), (3000, (16, 16, 16, 16)), (700, (3, 9, 1, 4)), (40, (5, 5, 5, 5)), (5000, (16, 16, 2))]
"""``(n, ranks)``: several in a slab, several slabs, both with a remainder, ragged ranks."""


def factors_of(rows: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    made = [[gaussian(n, r, seed=i + 7 * r, dtype=dtype) for i, r in enumerate(ranks)] for n, ranks in KINDS]
    return [[x.mT.contiguous() if rows else x for x in own] for own in made for _ in range(3)]


@pytest.fixture(autouse=True)
def several_threads(monkeypatch: pytest.MonkeyPatch, threads: object) -> None:
    monkeypatch.setattr(torch_slabs, "WORTH", 1)
    monkeypatch.setattr(torch_slabs, "LONG", 1)
    monkeypatch.setattr(torch_slabs, "SLAB_BYTES", 2**16)
    threads(3)  # type: ignore[operator]


def gram_jobs(kind: str, rows: bool, dtype: torch.dtype) -> list[GramJob]:
    jobs = []
    for x in factors_of(rows, dtype):
        k, r = len(x), max(f.shape[0 if rows else 1] for f in x)
        out = torch.zeros(k, k, r, r, dtype=torch.float64)
        jobs.append(GramJob(x, [(i, j, (i * k + j) * r * r) for i, j in blocks_of(kind, k)], rows, out, r))
    return jobs


def gram_error(jobs: list[GramJob]) -> float:
    """The largest of all blocks, relative to the norms of their factors."""
    errors = []
    for job in jobs:
        x = [(f if job.rows else f.mT).double() for f in job.factors]
        for block in job.blocks:
            i, j, _ = block
            error = (job.block(block) - x[i] @ x[j].mT).abs().max() / (x[i].norm() * x[j].norm())
            errors.append(float(error))
            assert i != j or torch.equal(job.block(block), job.block(block).mT)
    return max(errors)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("kind", ["chain", "pairs", "diagonal"])
def test_gram_jobs(kind: str, rows: bool) -> None:
    jobs = gram_jobs(kind, rows, torch.bfloat16)
    torch_gram.gram_pass(jobs)
    assert gram_error(jobs) <= FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gram_jobs_summed_in_float32(dtype: torch.dtype) -> None:
    """What is stored in float64 is not rounded."""
    jobs = gram_jobs("chain", False, dtype)
    torch_gram.gram_pass(jobs, torch.float32)
    error = gram_error(jobs)
    assert error <= FLOAT64 if dtype == torch.float64 else FLOAT64 < error <= SUMS32


def test_blocks_of_several_places() -> None:
    """Jobs of one kind, each at a place of its own in one tensor or another, touch nothing else."""
    x = [gaussian(300, 4, seed=s) for s in range(6)]
    outs = [torch.full((3, 7, 8), torch.nan, dtype=torch.float64) for _ in range(2)]
    blocks = [(0, 0, 2), (0, 1, 26)]
    jobs = [GramJob(x[2 * i : 2 * i + 2], blocks, False, outs[i % 2], 6, 56 * (2 - i)) for i in range(3)]
    torch_gram.gram_pass(jobs)
    assert gram_error(jobs) <= FLOAT64
    assert sum(int(out.isfinite().sum()) for out in outs) == 3 * 2 * 16


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_combine_jobs(dtype: torch.dtype, rows: bool) -> None:
    """Also of parameters of a model, with a result that is zero and one in another dtype."""
    jobs = []
    for x in factors_of(rows, dtype):
        first, last = (f.shape[0 if rows else 1] for f in (x[0], x[-1]))
        c = gaussian(first, last, seed=1, dtype=torch.float64)
        n = x[0].shape[1 if rows else 0]
        shape = (last, n) if rows else (n, last)
        given = torch.nn.Parameter(x[0])
        terms = [(len(x) - 1, None, 0, 0.3), (0, c.mT.contiguous() if rows else c, 0, -0.5)]
        outs = [torch.full(shape, torch.nan, dtype=d) for d in (dtype, torch.float64, dtype)]
        made = [CombineOutput.into(o, t) for o, t in zip(outs, (terms, terms, []), strict=True)]
        jobs.append(CombineJob([given, *x[1:]], made, rows))
    assert torch_combine.combine_pass(jobs) is None
    for job in jobs:
        first, last = (f.detach().double() for f in (job.factors[0], job.factors[-1]))
        c = gaussian(first.shape[0 if rows else 1], last.shape[0 if rows else 1], seed=1, dtype=torch.float64)
        wanted = 0.3 * last - 0.5 * (c.mT @ first if rows else first @ c)
        rounded, exact, zero = (output.out for output in job.outputs)
        assert rounded is not None and exact is not None and zero is not None
        assert float((exact - wanted).abs().max()) <= FLOAT64 * float(wanted.norm())
        assert float((rounded.double() - wanted).abs().max()) <= max(SUMS32, torch.finfo(dtype).eps) * 20
        assert not bool(zero.any()) and not rounded.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_combine_jobs_summed_in_float32(dtype: torch.dtype) -> None:
    """Coefficients are rounded to float32, too, and results that are float64 are summed in float64."""
    x, c = [gaussian(3000, 5, seed=s, dtype=dtype) for s in (1, 2)], gaussian(5, 5, seed=3, dtype=torch.float64)
    outs = [torch.full((3000, 5), torch.nan, dtype=d) for d in (torch.float32, torch.float64)]
    for out in outs:
        terms: list[CombineTerm] = [(0, None, 0, 1.0), (1, c, 0, 1.0)]
        job = CombineJob(x, [CombineOutput.into(out, terms)], False)
        assert torch_combine.combine_pass([job], torch.float32) is None
    wanted = x[0].double() + x[1].double() @ c
    single, double = (float((out - wanted).abs().max()) for out in outs)
    half_units = torch.finfo(torch.float32).eps / 2 * float(wanted.abs().max())
    assert double <= FLOAT64 * 20 and half_units < single <= SUMS32 * 20


@pytest.mark.parametrize(("scale", "size"), [(1e-44, 1e12), (1e39, 1e-12)], ids=str)
def test_coefficients_beyond_float32(scale: float, size: float) -> None:
    """Half precision is not summed in float32 then."""
    x, c = (size * gaussian(600, 4, seed=1)).bfloat16(), scale * gaussian(4, 3, seed=2, dtype=torch.float64)
    out = torch.full((600, 3), torch.nan, dtype=torch.bfloat16)
    assert torch_combine.combine_pass([CombineJob([x], [CombineOutput.into(out, [(0, c, 0, 1.0)])], False)]) is None
    torch.testing.assert_close(out.double(), x.double() @ c, rtol=2.0**-8, atol=0)


def test_places_that_overlap() -> None:
    """Their widths are that of the result, and two columns are nobody's."""
    x, c = gaussian(300, 4, seed=1), gaussian(4, 2, seed=2, dtype=torch.float64)
    out = torch.full((300, 6), torch.nan, dtype=torch.float32)
    terms: list[CombineTerm] = [(0, None, 0, 1.0), (0, c, 1, 1.0)]
    assert torch_combine.combine_pass([CombineJob([x], [CombineOutput.into(out, terms)], False)]) is None
    wanted = torch.nn.functional.pad(x.double(), (0, 2))
    wanted[:, 1:3] += x.double() @ c
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=SUMS32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_factors_of_rank_zero(dtype: torch.dtype) -> None:
    x, none = gaussian(50, 3, seed=1, dtype=dtype), torch.empty(50, 0, dtype=dtype)
    out, gram = torch.full((50, 3), torch.nan, dtype=dtype), torch.full((9,), torch.nan, dtype=torch.float64)
    terms = [(0, None, 0, 1.0), (1, torch.empty(0, 3, dtype=torch.float64), 0, 1.0)]
    assert torch_combine.combine_pass([CombineJob([x, none], [CombineOutput.into(out, terms)], False)]) is None
    assert torch.equal(out, x)
    torch_gram.gram_pass([GramJob([x, none], [(0, 0, 0), (0, 1, 9), (1, 1, 9)], False, gram, 3)])
    torch.testing.assert_close(gram.view(3, 3), x.double().mT @ x.double(), rtol=0, atol=FLOAT64 * 50)


def test_the_first_of_several_problems_is_told(tmp_path: Path) -> None:
    bad = gaussian(600, 4, seed=1)
    bad[5, 1] = torch.nan
    with (tmp_path / "f").open("w+b") as file:
        to = [CombineOutput((600, 4), torch.float32, [(0, None, 0, 1.0)], None, file.fileno(), 0, True)]
        jobs = [CombineJob([x], to, False) for x in (gaussian(600, 4, seed=2), bad, bad, bad)]
        assert torch_combine.combine_pass(jobs) == WriteProblem(1, 0, None)
