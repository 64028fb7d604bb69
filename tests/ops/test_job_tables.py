"""What compiled code makes of jobs and of factors: what it holds, looks at again, and refuses."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Elsewhere, gaussian
from compiled import needs_kernels
from torch import Tensor

from fastlora.backends import cpu
from fastlora.core.factors import Factor, Term
from fastlora.ops.dispatch import prepared
from fastlora.ops.passes import CombineJob, CombineOutput, GramJob, WriteProblem

pytestmark = needs_kernels

X = gaussian(9, 3, seed=1)
C = gaussian(3, 2, seed=2, dtype=torch.float64)


def product(x: Tensor, c: Tensor) -> Tensor:
    return (x.double() @ c).to(x.dtype)


def made(kind: str) -> tuple[Any, list[weakref.ref[Tensor]]]:
    """Tables of some tensors that nobody else holds, and whether these are still there."""
    x, c, out = X.clone(), C.clone(), torch.empty(9, 2)
    blocks = torch.empty(1, 1, 1, 3, 3, dtype=torch.float64)
    if kind == "GramJobs":
        tables, used = cpu._core.GramJobs([GramJob([x], [(0, 0, 0)], False, blocks, 3)], Tensor), [x, blocks]
    elif kind == "CombineJobs":
        output = CombineOutput.into(out, [(0, c, 0, 1.0)])
        tables, used = cpu._core.CombineJobs([CombineJob([x], [output], False)], Tensor, cpu.DTYPES), [x, c, out]
        output.out, output.terms = None, ()  # an output that is used for something else
    elif kind == "GramFactors":
        tables = cpu._core.GramFactors([([[Factor.of("B", x)]], blocks, 3, [(0, 0, 0)])], Tensor)
        used = [x, blocks]
    else:
        tables, used = cpu._core.FactorJobs([([Factor("B", 9, 2, (Term(x, c),))], [out])], Tensor), [x, c, out]
    return tables, [weakref.ref(t) for t in used]


@pytest.mark.parametrize("kind", ["GramJobs", "CombineJobs", "GramFactors", "FactorJobs"])
def test_tables_hold_every_tensor_that_they_point_to(kind: str) -> None:
    tables, used = made(kind)
    gc.collect()
    assert [ref() is not None for ref in used] == [True] * len(used)
    tables.run(1)
    del tables
    assert [ref() for ref in used] == [None] * len(used)


def test_scales_and_places_are_looked_at_again(tmp_path: Path) -> None:
    """Also behind a term that is left out of the table, since its coefficient is empty."""
    empty = torch.empty(3, 0, dtype=torch.float64)
    with (tmp_path / "f").open("w+b") as file:
        output = CombineOutput((9, 2), torch.float32, [(0, empty, 0, 1.0), (0, C, 0, 1.0)], None, file.fileno())
        ready = prepared("combine_pass", [CombineJob([X], [output], False)])
        assert ready.run() is None
        output.terms, output.offset = [(0, empty, 0, 5.0), (0, C, 0, -2.0)], 100
        ready.renew()  # type: ignore[attr-defined]
        assert ready.run() is None
        for at, scale in ((0, 1.0), (100, -2.0)):
            file.seek(at)
            assert file.read(72) == bytes(product(X, scale * C).view(torch.uint8).numpy().tobytes())
        output.terms = [(0, C, 0, 1.0)]
        with pytest.raises(ValueError, match="an output has lost terms"):
            ready.renew()  # type: ignore[attr-defined]


def test_a_problem_is_of_the_first_output_of_a_later_job(tmp_path: Path) -> None:
    bad = X.index_fill(1, torch.tensor([1]), torch.nan)
    with (tmp_path / "f").open("w+b") as file:
        jobs = [CombineJob([], [CombineOutput.copy(x, file.fileno(), 0, True) for x in own], False)
                for own in ((X, X), (bad, X), (X,))]  # fmt: skip
        assert prepared("combine_pass", jobs).run() == WriteProblem(1, 0, None)


@pytest.mark.parametrize("tensor", [Tensor, object], ids=["dlpack", "attributes"])
def test_a_single_row_is_as_long_as_it_says(tensor: type, tmp_path: Path) -> None:
    """torch gives it any stride, as that of the matrix that it was cut from."""
    row = gaussian(4, 50, seed=3)[:, 7:12][2:3]
    with (tmp_path / "f").open("w+b") as file:
        copied = CombineOutput.copy(row, file.fileno(), 0, True)
        assert cpu._core.CombineJobs([CombineJob([], [copied], False)], tensor, cpu.DTYPES).run(1) == (0, 0, 0, 0)
    assert (tmp_path / "f").read_bytes() == row.contiguous().view(torch.uint8).numpy().tobytes()


def test_rows_of_coefficients_and_results_lie_apart() -> None:
    c, wide = gaussian(3, 8, seed=4, dtype=torch.float64)[:, 2:4], torch.full((9, 8), 7.0)
    out = wide[:, 5:7]
    for tables in (
        cpu._core.CombineJobs(
            [CombineJob([X], [CombineOutput.into(out, [(0, c, 0, 1.0)])], False)], Tensor, cpu.DTYPES
        ),
        cpu._core.FactorJobs([([Factor("B", 9, 2, (Term(X, c),))], [out])], Tensor),
    ):
        out.zero_()
        tables.run(1)
        assert torch.equal(out, product(X, c)) and int((wide == 7.0).sum()) == 9 * 6


@pytest.mark.parametrize(
    ("factor", "coefficient", "out", "message"),
    [
        (X, C, torch.empty(18), "a result is a matrix in memory"),
        (X, C, torch.empty(9, 2, device="meta"), "a result is a matrix in memory"),
        (X, C[0], torch.empty(9, 2), "a coefficient is a matrix"),
        (X, C.to("meta"), torch.empty(9, 2), "a coefficient must be float64"),
        (X.to("meta"), C, torch.empty(9, 2), "a matrix is not in the memory of the processor"),
    ],
    ids=["flat result", "result elsewhere", "flat coefficient", "coefficient elsewhere", "factor elsewhere"],
)
def test_what_lies_elsewhere_or_is_no_matrix(factor: Tensor, coefficient: Tensor, out: Tensor, message: str) -> None:
    """As attributes tell it: DLPack does not describe what has no memory."""
    output = CombineOutput((9, 2), torch.float32, [(0, coefficient, 0, 1.0)], out)
    with pytest.raises(ValueError, match=message):
        cpu._core.CombineJobs([CombineJob([factor], [output], False)], object, cpu.DTYPES)


def test_a_tensor_that_has_its_numbers_elsewhere() -> None:
    with pytest.raises(ValueError, match="not in the memory of the processor"):
        cpu._core.GramJobs([GramJob([Elsewhere(X.shape)], [(0, 0, 0)], False, torch.empty(3, 3).double(), 3)], Tensor)


def run_factors(*sides: tuple[list[Factor], list[Tensor]]) -> bool:
    done: bool = cpu._core.FactorJobs(list(sides), Tensor).run(1)
    return done


def test_factors_of_other_lengths_or_sides_are_left_to_others() -> None:
    """Also where all that they are made of has one length."""
    one, long = Factor.of("B", X), Factor("B", 12, 3, (Term(X),))
    across = Factor.of("A", gaussian(3, 9, seed=5))
    outs = [torch.empty(9, 3), torch.empty(12, 3), torch.empty(3, 9)]
    assert run_factors(([one], outs[:1])) and torch.equal(outs[0], X)
    empty = Factor("B", 12, 3, ())
    for factors, results in (([one, long], outs[:2]), ([one, empty], outs[:2]), ([one, across], outs[::2])):
        assert not run_factors((factors, results))
    square = gaussian(9, 9, seed=6)
    both = [Factor.of("B", square), Factor.of("A", square)]
    assert not run_factors((both, [torch.empty(9, 9)] * 2))
    blocks = torch.empty(1, 2, 2, 9, 9, dtype=torch.float64)
    for modules in ([[one, long]], [both]):
        assert not cpu._core.GramFactors([(modules, blocks, 9, [(0, 1, 0)])], Tensor).run(1)


@pytest.mark.parametrize(
    "term", [Term(X, C, -1), Term(X, C, 1), Term(X, C[0]), Term(X, C.mT), Term(X[:8], C)],
    ids=["before", "behind", "flat", "of another rank", "shorter"],
)  # fmt: skip
def test_terms_that_do_not_fit_are_left_to_others(term: Term) -> None:
    out = torch.zeros(9, 2)
    assert not run_factors(([Factor("B", 9, 2, (term,))], [out])) and not out.any()


@pytest.mark.parametrize(
    "out",
    [torch.empty(18), torch.empty(9, 3), torch.empty(8, 2), torch.empty(2, 9).mT, Elsewhere(torch.Size((9, 2)))],
    ids=["flat", "wide", "short", "columns", "elsewhere"],
)
def test_results_that_do_not_fit(out: Tensor) -> None:
    factor = Factor("B", 9, 2, (Term(X, C),))
    with pytest.raises(ValueError, match="a result is a matrix in memory, of the shape of its factor"):
        run_factors(([factor], [out]))
    with pytest.raises(ValueError, match="every factor has a result"):
        run_factors(([factor, factor], [torch.empty(9, 2)]))


def test_sides_that_share_matrices() -> None:
    """A matrix is one where it is the same piece of memory, in the same shape, and on the same side."""
    wide = gaussian(9, 6, seed=7)
    twice = [wide[:, :3], wide[:, :3]]  # two tensors of one piece
    sides = []
    for sources in ([X, wide], [wide, *twice, X], [wide[:, :2], *twice]):
        factors = [Factor.of("B", x) for x in sources]
        sides.append((factors, [torch.empty(x.shape) for x in sources]))
    assert run_factors(*sides)
    for factors, outs in sides:
        for factor, out in zip(factors, outs, strict=True):
            assert factor.stored is not None and torch.equal(out, factor.stored)
