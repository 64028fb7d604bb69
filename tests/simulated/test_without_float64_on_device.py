"""The backend `torch` on a device without float64: nothing in float64 is made there, and no digit is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_plain_torch_on_device as calls
import torch
from builders import gaussian
from pools import MODULE
from simulated import WithoutFloat64
from test_plan import ragged_pool
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.ops.dispatch import resolve
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm, GramJob

GRAM = 2.0**-52  # of n·max|x|·max|y|


def put(x: Tensor) -> Tensor:
    """On the device, but for float64, which is on the host."""
    return x.clone() if x.dtype == torch.float64 else WithoutFloat64(x.clone())


def test_the_device_has_no_float64(device: None) -> None:
    x = put(torch.ones(3))
    assert x.device.type == "mps"
    with pytest.raises(TypeError, match="no float64"):
        x.double()


@pytest.mark.parametrize("call", calls.CALLS.values(), ids=calls.CALLS)
def test_ops(call: Any, device: None) -> None:
    """Those that need float64 have the bits of the host, where they are computed."""
    with fl.use_backend("torch"):
        wanted, found = call(lambda x: x.clone()), call(put)
    bound = GRAM * 37 * float(calls.TALL.abs().max()) ** 2 if call in GRAMS else 0.0
    for one, two in zip(calls.numbers(wanted), calls.numbers(found), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one.isnan(), two.isnan())
        assert float((one - two).abs().nan_to_num().max()) <= bound


GRAMS = [call for name, call in calls.CALLS.items() if name.startswith("gram")]


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_passes(dtype: torch.dtype, rows: bool, device: None) -> None:
    """Half precision is combined on the device, in float32; float32, and what is extreme, on the host."""
    x = [gaussian(700, r, seed=r, dtype=dtype) for r in (6, 4)]
    factors = [put(f.mT.contiguous() if rows else f) for f in x]
    out = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    job = GramJob(factors, [(0, 0, 0), (0, 1, 36)], rows, out, 6)
    resolve("gram_pass", [job]).launch([job])
    for block, other in zip(job.blocks, x, strict=True):
        exact = x[0].double().mT @ other.double()
        bound = GRAM * 700 * float(x[0].abs().max()) * float(other.abs().max())
        assert float((job.block(block) - exact).abs().max()) <= bound
    for scale in (1.0, 1e-25):
        c = scale * gaussian(4, 6, seed=1, dtype=torch.float64)
        terms: list[CombineTerm] = [(0, None, 0, 0.5), (1, c.mT.contiguous() if rows else c, 0, -1.0)]
        given = put(torch.full((6, 700) if rows else (700, 6), torch.nan, dtype=dtype))
        combine = CombineJob(factors, [CombineOutput.into(given, terms)], rows)
        assert resolve("combine_pass", [combine]).launch([combine]) is None
        wanted = 0.5 * x[0].double() - x[1].double() @ c
        size = 0.5 * x[0].double().abs() + x[1].double().abs() @ c.abs()
        found = given.cpu().double()
        error = ((found.mT if rows else found) - wanted).abs()
        slack = (2.0**-50 if dtype == torch.float32 else 2.0**-22) * size + torch.finfo(dtype).smallest_normal * 2**-11
        assert (error <= torch.finfo(dtype).eps / 2 * (1 + 2**-12) * wanted.abs() + slack).all()


def ties(pool: fl.Pool) -> fl.Adapter:
    return fl.merge(pool, method="ties", density=0.3, rank=3, min_energy=0.0)


WHOLE: dict[str, Any] = {
    "decompose": lambda pool: list(fl.decompose(pool, 0.5).adapters().values()),
    "decompose, pairs": lambda pool: list(fl.decompose(pool, 0.5, mode="pairs").adapters().values()),
    "decompose, mean": lambda pool: list(fl.decompose(pool, 0.3, chain="mean").adapters().values()),
    "sum": lambda pool: [pool["a0"] - 0.5 * pool["a1"]],
    "compress": lambda pool: [(pool["a0"] + pool["a1"]).compress(2)],
    "ties": lambda pool: [ties(pool)],
    **{
        method: lambda pool, m=method: [fl.merge(pool, method=m)] for method in ("svd", "tsv", "iso_c", "knots", "wudi")
    },
}


@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_whole_calls(call: Any, device: None) -> None:
    """Factors on the device: what it has no float64 for is on the host, and results are where the factors are."""
    pool = ragged_pool()
    there = pool.to("mps")
    assert isinstance(there["a0"].updates[MODULE].B.stored, WithoutFloat64)
    for wanted, found in zip(call(pool), call(there), strict=True):
        for module in wanted.modules:
            expected, delta = wanted.delta(module), found.delta(module)
            on_host = call is WHOLE["ties"] or not bool(expected.any())  # made there, or of nothing
            assert isinstance(delta, WithoutFloat64) is not on_host
            assert float((delta.cpu() - expected).norm()) <= FLOAT32 * float(expected.norm())


def test_overlap(device: None) -> None:
    pool = ragged_pool()
    found, wanted = fl.overlap(pool.to("mps")), fl.overlap(pool)
    torch.testing.assert_close(torch.as_tensor(found.cosine), torch.as_tensor(wanted.cosine), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("memory", [None, "1MiB"])
def test_files(memory: str | None, device: None, tmp_path: Path) -> None:
    pool = ragged_pool()
    for name, where in (("host", "cpu"), ("there", "mps")):
        fl.decompose(pool, 0.5, device=where, memory=memory).save(tmp_path / name)
        fl.merge(pool, rank=3, device=where, memory=memory).save(tmp_path / name / "merged")
    for place in ("unique/a0", "shared", "merged"):
        one, two = (fl.load(tmp_path / name / place) for name in ("host", "there"))
        for module in one.modules:
            expected = one.delta(module)
            assert float((two.delta(module) - expected).norm()) <= FLOAT32 * float(expected.norm())
