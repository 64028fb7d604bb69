"""What kernels are asked for: each stored matrix once, and nothing that cannot be computed together."""

from __future__ import annotations

import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.core.factors import Factor, Term, add
from fastlora.core.updates import Update
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.engine.gram import GramPass
from fastlora.engine.materialise import materialise, materialise_groups

B = gaussian(9, 3, seed=1)
SMALL = gaussian(3, 2, seed=2, dtype=torch.float64)


def test_a_matrix_behind_several_factors_is_there_once() -> None:
    whole, part = Factor.of("B", B), Factor.of("B", B).times(SMALL)
    again = Factor.of("B", B.view(9, 3))  # another tensor on the same memory
    outs = [torch.empty(9, f.rank) for f in (whole, part, again)]
    wanted = [WantedFactor(f, torch.float32, out) for f, out in zip((whole, part, again), outs, strict=True)]
    job = combine_job(wanted)
    assert len(job.factors) == 1 and not job.rows
    assert [o.out is out for o, out in zip(job.outputs, outs, strict=True)] == [True] * 3


def test_coefficients_are_used_where_they_lie() -> None:
    for factor, small in ((Factor.of("B", B), SMALL), (Factor.of("A", B.mT.contiguous()), SMALL.mT.contiguous().mT)):
        sum_of_two = add([factor.times(small), factor.times(small)])
        job = combine_job([WantedFactor(sum_of_two, torch.float32, torch.empty(sum_of_two.shape))])
        assert {c.data_ptr() for _, c, _, _ in job.outputs[0].terms if c is not None} == {small.data_ptr()}


def test_a_file_gets_a_stored_matrix_as_it_is_and_anything_else_computed() -> None:
    factors = Factor.of("B", B), Factor.of("B", B).times(SMALL), Factor.of("B", B.bfloat16()), Factor.of("B", B[:, :2])
    job = combine_job([WantedFactor(f, torch.float32, None, 64 * i) for i, f in enumerate(factors)])
    assert [o.out is None for o in job.outputs] == [False, True, True, True]  # the last lies with gaps
    assert [o.offset for o in job.outputs] == [0, 64, 128, 192] and all(o.check for o in job.outputs)


def updates_of_two_modules(scale: float = 1.0) -> list[Update]:
    return [
        Update(Factor.of("B", gaussian(n, 3, seed=n)).scaled(scale), Factor.of("A", gaussian(3, 14, seed=m)))
        for n, m in ((9, 2), (8, 3))
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["stored", "computed"])
def test_updates_of_different_modules_are_refused(scale: float) -> None:
    one, two = updates_of_two_modules(scale)
    with pytest.raises(fl.InputError, match="of different modules: their factors have the lengths 8, 9"):
        materialise([one, two], torch.float32)
    (first,), (second,) = materialise_groups([[one], [two]], torch.float32)
    for (left, right), update in ((first, one), (second, two)):
        torch.testing.assert_close(left @ right, pools.exact(update).float())


def test_writing_one_module_in_two_shapes_is_refused() -> None:
    wanted = [WantedFactor(u.B, torch.float32) for u in updates_of_two_modules()]
    with pytest.raises(fl.InputError, match="of different modules"):
        combine_job(wanted)


def test_a_gram_pass_over_sums_is_not_prepared() -> None:
    """A plan would run the launches without what a sum needs afterwards."""
    grams = GramPass()
    grams.blocks([[Factor("B", 9, 3, (Term(B, scale=2.0),))]], 3, [(0, 0)])
    with pytest.raises(ValueError, match="over sums of matrices cannot be prepared"):
        grams.prepared()
