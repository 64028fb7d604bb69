"""The tests of the Triton kernels alone (tests/triton/interpreted.py), with every tensor of a plan on the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT64
from torch import Tensor

from fastlora.backends import triton
from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import CombineJob, GramJob

sys.path.append(str(Path(__file__).parents[1] / "triton"))

from interpreted import (
    test_a_round_of_several_kinds_is_repaired_by_dtype as test_a_round_of_several_kinds_is_repaired_by_dtype,
)
from interpreted import (  # the tests themselves
    test_bits_do_not_depend_on_the_tiles as test_bits_do_not_depend_on_the_tiles,
)
from interpreted import test_blocks_in_any_order_and_place as test_blocks_in_any_order_and_place
from interpreted import test_copies_keep_their_bits as test_copies_keep_their_bits
from interpreted import (
    test_extreme_coefficients_are_taken_in_float64 as test_extreme_coefficients_are_taken_in_float64,
)
from interpreted import test_factors_of_several_dtypes as test_factors_of_several_dtypes
from interpreted import test_float64_sums_are_rounded_once as test_float64_sums_are_rounded_once
from interpreted import (
    test_nothing_is_read_of_what_is_not_present as test_nothing_is_read_of_what_is_not_present,
)
from interpreted import test_plans_follow_the_contents as test_plans_follow_the_contents
from interpreted import test_results_of_one_matrix_and_sums as test_results_of_one_matrix_and_sums
from interpreted import test_results_on_tensor_cores as test_results_on_tensor_cores
from interpreted import test_units_and_tiles_of_tensor_cores as test_units_and_tiles_of_tensor_cores


class OnDevice:
    """A plan on copies of the tensors' whole storages, so that strides and gaps are theirs; ``run`` copies what the
    tensors hold there, and results back."""

    def __init__(self, make: Callable[[Sequence[Any]], Any], jobs: Sequence[GramJob | CombineJob]) -> None:
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}
        self._plan = make([self._job(job) for job in jobs])
        self.launches = self._plan.launches

    def _twin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = host, torch.empty_like(host, device="cuda")
        there = self._storages[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device="cuda").set_(there, x.storage_offset(), x.shape, x.stride())

    def _job(self, job: GramJob | CombineJob) -> GramJob | CombineJob:
        factors = [self._twin(x) for x in job.factors]
        if isinstance(job, GramJob):
            return replace(job, factors=factors, out=self._twin(job.out))
        outputs = [
            replace(
                o,
                out=None if o.out is None else self._twin(o.out),
                present=None if o.present is None else self._twin(o.present),
                terms=[(f, None if c is None else self._twin(c), at, scale) for f, c, at, scale in o.terms],
            )
            for o in job.outputs
        ]
        return replace(job, factors=factors, outputs=outputs)

    def run(self) -> None:
        for host, there in self._storages.values():
            there.copy_(host)
        self._plan.run()
        for host, there in self._storages.values():
            host.copy_(there)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_rows_beyond_32_bits(rows: bool) -> None:
    """Elements 2^31 and 2^32 further on are found; takes 11 GB of the device's memory."""
    count, r, stride = 6, 8, 2**30 + 8
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of free device memory")
    flat = torch.empty((count - 1) * stride + r, dtype=torch.bfloat16, device="cuda")
    x = flat.as_strided((count, r), (stride, 1))
    x.copy_(torch.randn(count, r, generator=torch.Generator().manual_seed(1)))
    size = count if rows else r
    job = GramJob([x], [(0, 0, 0)], rows, torch.zeros(size, size, dtype=torch.float64, device="cuda"), size)
    resolve("gram_pass", [job]).launch([job])
    columns = (x.mT if rows else x).double()
    # A sum each, and no condition.
    torch.testing.assert_close(job.out, columns.mT @ columns, rtol=FLOAT64 / 10, atol=FLOAT64 / 10)
    del flat, x, columns
    torch.cuda.empty_cache()


def test_finite() -> None:
    for value in (0.0, torch.nan, torch.inf, -torch.inf):
        x = torch.randn(5, 4).bfloat16()
        x[2, 3] = value
        assert resolve("finite", x.cuda()).launch(x.cuda()) == (value == 0)


@pytest.fixture(autouse=True)
def _on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ours = "rows_beyond" in request.node.name or "finite" in request.node.name  # these are on the device as they are
    for name in () if ours else ("prepare_gram", "prepare_combine"):
        make = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda jobs, make=make: OnDevice(make, jobs))
    yield
