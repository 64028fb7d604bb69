"""Coefficients without elements have no address, which kernels must not take for the identity's."""

from __future__ import annotations

import pytest
import torch
from builders import gaussian

from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_an_empty_coefficient_adds_nothing(rows: bool) -> None:
    factor = gaussian(4, 9, seed=1) if rows else gaussian(9, 4, seed=1)
    own = gaussian(2, 4, seed=2).double() if rows else gaussian(4, 2, seed=2).double()
    empty = torch.zeros((0, 4) if rows else (4, 0), dtype=torch.float64)
    out = torch.full((2, 9) if rows else (9, 2), torch.nan)
    terms: list[CombineTerm] = [(0, own, 0, 1.0), (0, empty, 0, 1.0)]
    jobs = [CombineJob([factor], [CombineOutput.into(out, terms)], rows)]
    resolve("combine_pass", jobs).launch(jobs)
    expected = own @ factor.double() if rows else factor.double() @ own
    torch.testing.assert_close(out, expected.float())
