"""A prepared decomposition is the decomposition: any chain and side, ragged pools, new data, results that are saved."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pools
import pytest
import torch
from compiled import needs_kernels
from simulated import DEVICE
from tolerances import FLOAT32, FLOAT64, HALF, SUMS32

import fastlora as fl
from fastlora.adapters.lora import Adapter

THRESHOLD = 0.5


def ragged_pool(dtype: torch.dtype = torch.float32, seed: int = 0) -> fl.Pool:
    """Three adapters of unequal ranks; one module that two have, one that a single adapter has."""
    first = pools.cast(pools.ragged(3), dtype)
    second = pools.cast(pools.planted(3, seed=9 + seed), dtype)
    parts = [{pools.MODULE: first[0], "other": second[0]}, {pools.MODULE: first[1]}]
    parts.append({pools.MODULE: first[2], "other": second[2], "alone": second[1]})
    return fl.Pool(pools.make_adapter(f"a{i}", p) for i, p in enumerate(parts))


def expected(pool: fl.Pool, **settings: object) -> dict[str, Adapter]:
    return fl.decompose(pool, THRESHOLD, **settings).adapters()  # type: ignore[arg-type]


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {m: adapter.delta(m) for m in adapter.modules}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_decompose(chain: str, side: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pool = ragged_pool(dtype)
    plan = fl.DecompositionPlan(pool, THRESHOLD, chain=chain, side=side)
    plan.run()
    found, wanted = plan.adapters(), expected(pool, chain=chain, side=side)
    assert list(found) == list(wanted)
    assert any(u.rank for u in wanted["shared"].updates.values())
    for place, adapter in found.items():
        adapter.save(tmp_path / "found" / place)
        wanted[place].save(tmp_path / "wanted" / place)
        got, right = (fl.load(tmp_path / which / place) for which in ("found", "wanted"))
        assert got.modules == right.modules
        tolerance = 2 * (FLOAT32 if dtype == torch.float32 else HALF)
        for module, delta in deltas(right).items():
            error = (got.delta(module) - delta).norm() / delta.norm().clamp(min=1e-6)
            assert error < tolerance, (place, module)


def test_the_report_is_that_of_decompose() -> None:
    pool = ragged_pool()
    plan = fl.DecompositionPlan(pool, THRESHOLD)
    plan.run()
    found, wanted = plan.decomposition().report, fl.decompose(pool, THRESHOLD).report
    for got, right in zip(found.rows, wanted.rows, strict=True):
        assert (got.module, got.shared, got.directions) == (right.module, right.shared, right.directions)
        assert got.eigenvalues == pytest.approx(right.eigenvalues, rel=FLOAT64)
        assert got.energy_shared == pytest.approx(right.energy_shared, rel=FLOAT64)


def test_the_other_side_of_what_is_shared_may_be_nothing() -> None:
    """The pass is told where it can see that, by the chain's counts; all else is made in any case."""
    pool = ragged_pool()
    plan = fl.DecompositionPlan(pool, THRESHOLD)
    for part in plan.parts:
        jobs = part.combine_jobs(plan._memory)
        for projected, other, count in zip(jobs[::2], jobs[1::2], part.chain.shared, strict=True):
            assert all(output.present is None for output in projected.outputs)
            (mixed,) = other.outputs
            assert mixed.present is not None and mixed.present.data_ptr() == count.data_ptr()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["product", "mean"])
def test_new_data_of_the_same_shapes(chain: str, side: str) -> None:
    one, two = ragged_pool(), ragged_pool(seed=5)
    plan = fl.DecompositionPlan(fl.Pool(_cloned(a) for a in one.adapters), THRESHOLD, chain=chain, side=side)
    plan.run()
    plan.fill(two)
    plan.run()
    found = plan.adapters()
    for place, adapter in expected(two, chain=chain, side=side).items():
        for module, delta in deltas(adapter).items():
            torch.testing.assert_close(found[place].delta(module), delta, rtol=SUMS32, atol=FLOAT32)


def _cloned(adapter: Adapter) -> Adapter:
    parts = {m: (u.B.stored.clone(), u.A.stored.clone(), u.scaling) for m, u in adapter.updates.items()}  # type: ignore[union-attr]
    return pools.make_adapter(adapter.name, parts)


def test_runs_make_the_same_bits() -> None:
    plan = fl.DecompositionPlan(ragged_pool(), THRESHOLD)
    plan.run()
    before = {p: {m: d.clone() for m, d in deltas(a).items()} for p, a in plan.adapters().items()}
    plan.run()
    for place, adapter in plan.adapters().items():
        assert all(torch.equal(d, before[place][m]) for m, d in deltas(adapter).items())


@needs_kernels
def test_on_a_device(device: None) -> None:
    pool = ragged_pool()
    plan = fl.DecompositionPlan(pool.to("cuda"), THRESHOLD)
    assert plan.device == DEVICE
    plan.run()
    for place, adapter in expected(pool).items():
        got = plan.adapters()[place].to("cpu")
        for module, delta in deltas(adapter).items():
            torch.testing.assert_close(got.delta(module), delta, rtol=SUMS32, atol=FLOAT32)


@needs_kernels
def test_a_graph_keeps_the_memory_that_it_works_in(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        pass

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, own in {
        "Stream": lambda device: stream, "current_stream": lambda device: stream, "CUDAGraph": Graph,
        "stream": lambda stream: contextlib.nullcontext(), "graph": lambda graph, stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, own)
    plan = fl.DecompositionPlan(ragged_pool().to("cuda"), THRESHOLD)
    memory = [weakref.ref(t) for own in plan.unique_parts.values() for t in own.values()]
    graph = plan.capture()
    assert graph.plan is plan  # type: ignore[attr-defined]
    del plan
    gc.collect()
    assert memory and all(part() is not None for part in memory)
    del graph
    gc.collect()
    assert all(part() is None for part in memory)


def test_refusals() -> None:
    pool = ragged_pool()
    with pytest.raises(fl.InputError, match="a CUDA graph needs a pool on a CUDA device, not on cpu"):
        fl.DecompositionPlan(pool).capture()
    with pytest.raises(fl.InputError, match=r"of adapter .* is computed from other matrices; save and load it"):
        fl.DecompositionPlan(fl.Pool([0.5 * pool["a0"] + pool["a1"], pool["a2"]]))
    for given in ({"threshold": "soft"}, {"weighting": "energy"}):
        with pytest.raises(fl.InputError, match=r"plan: .* needs decompositions on the CPU, .*; use fl\.decompose"):
            fl.DecompositionPlan(pool, chain="mean", **given)  # type: ignore[arg-type]
    with pytest.raises(fl.InputError, match="a pool of one adapter"):
        fl.DecompositionPlan(pool.subset(["a0"]))
    plan = fl.DecompositionPlan(pool)
    with pytest.raises(fl.InputError, match="it was made for 3 adapters, not for 2"):
        plan.fill(pool.subset(["a0", "a1"]))
    with pytest.raises(fl.InputError, match="have different modules"):
        plan.fill(pool.subset(["a1", "a0", "a2"]))
    with pytest.raises(fl.InputError, match=r"the plan's .* torch.float32; make a new plan"):
        plan.fill(ragged_pool(torch.bfloat16))
    scaled = fl.Pool([2.0 * pool["a0"], pool["a1"], pool["a2"]], align=False)
    with pytest.raises(fl.InputError, match="make a new plan"):
        plan.fill(scaled)


def test_bad_values_are_named() -> None:
    pool = ragged_pool()
    plan = fl.DecompositionPlan(fl.Pool(_cloned(a) for a in pool.adapters), THRESHOLD)
    plan.pool["a1"].updates[pools.MODULE].B.stored[0, 0] = torch.nan  # type: ignore[index]
    plan.run()
    with pytest.raises(fl.InputError, match=f"adapter 'a1': lora_B of {pools.MODULE} holds NaN or Inf"):
        plan.components()
