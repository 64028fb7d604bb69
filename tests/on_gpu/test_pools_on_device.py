"""Whole decompositions on a CUDA device: graphs, new data, no allocation, no waiting, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32, HALF, MODEL32, ROUNDED32, SUMS32

import fastlora as fl
from fastlora.bench.workloads import Workload, llama, make_pool
from fastlora.core import updates
from fastlora.decomposition import plan as plans
from fastlora.engine import stream as streams

TAU = 0.5
SMALL = {"q": (96, 64), "k": (32, 64), "up": (160, 64), "down": (64, 160)}


def small(dtype: torch.dtype = torch.bfloat16, seed: int = 0, rank: int = 8) -> fl.Pool:
    return make_pool(Workload(SMALL, 3, rank, dtype), seed)


def require_close(plan: fl.DecompositionPlan, wanted: fl.Decomposition, tolerance: float) -> None:
    """Every ``ΔW`` of the results, by the size of what was decomposed: a part may be all but zero."""
    found = plan.adapters()
    assert list(found) == list(wanted.adapters())
    for place, adapter in wanted.adapters().items():
        own = found[place].to("cpu")
        for module in adapter.modules:
            size = max(float(a.delta(module).norm()) for a in wanted.pool.adapters)
            error = float((own.delta(module) - adapter.delta(module)).norm()) / size
            assert error < tolerance, (place, module, error)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["product", "palindrome", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_plan_is_the_decomposition(dtype: torch.dtype, chain: str, side: str) -> None:
    pool = small(dtype)
    plan = fl.DecompositionPlan(pool.to("cuda"), TAU, chain=chain, side=side, dtype=torch.float32)
    plan.run()
    require_close(plan, fl.decompose(pool, TAU, chain=chain, side=side), 2 * SUMS32)


@pytest.mark.parametrize("rank", [1, 3, 16, 33, 64])
def test_ranks(rank: int) -> None:
    pool = small(torch.float32, rank=rank)
    plan = fl.DecompositionPlan(pool.to("cuda"), TAU)
    plan.run()
    require_close(plan, fl.decompose(pool, TAU), 5 * SUMS32)


def test_a_graph_replays_with_new_data() -> None:
    one, two = small(), small(seed=7)
    plan = fl.DecompositionPlan(one.to("cuda"), TAU)
    graph = plan.capture()
    for pool in (one, two, one):
        plan.fill(pool)
        graph.replay()
        found = {p: a.to("cpu") for p, a in plan.adapters().items()}
        fresh = fl.DecompositionPlan(pool.to("cuda"), TAU)
        fresh.run()
        for place, adapter in fresh.adapters().items():
            own = adapter.to("cpu")
            assert all(torch.equal(found[place].delta(m), own.delta(m)) for m in own.modules), place


def test_a_graph_outlives_the_name_of_its_plan() -> None:
    """What its plan holds is not given to others as long as the graph is there."""
    graph = fl.DecompositionPlan(small().to("cuda"), TAU).capture()
    others = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(8)]
    for _ in range(2):
        graph.replay()
    found = {place: adapter.to("cpu") for place, adapter in graph.plan.adapters().items()}  # type: ignore[attr-defined]
    wanted = fl.DecompositionPlan(small().to("cuda"), TAU)
    wanted.run()
    for place, adapter in wanted.adapters().items():
        own = adapter.to("cpu")
        assert all(torch.equal(found[place].delta(m), own.delta(m)) for m in own.modules), place
    assert all(bool(x.isnan().all()) for x in others)


def test_a_graph_of_two_halves_has_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains on a stream of their own, beside the passes over the other half: the same, run by run."""
    made = []
    for least in (2**60, 0):
        monkeypatch.setattr(plans, "WORTH", least)
        plan = fl.DecompositionPlan(small().to("cuda"), TAU)
        assert len(plan.halves) == (1 if least else 2)
        graph = plan.capture()
        for _ in range(3):
            plan.fill(small(seed=5))
            graph.replay()
            made.append({p: a.to("cpu") for p, a in plan.adapters().items()})
    for other in made[1:]:
        for place, adapter in made[0].items():
            assert all(torch.equal(other[place].delta(m), adapter.delta(m)) for m in adapter.modules), place


def test_a_run_allocates_nothing_and_waits_for_nothing() -> None:
    plan = fl.DecompositionPlan(small().to("cuda"), TAU)
    plan.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_on_another_stream() -> None:
    pool = small().to("cuda")
    plan = fl.DecompositionPlan(pool, TAU)
    plan.run()
    first = {p: a.to("cpu") for p, a in plan.adapters().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        plan.run()
    stream.synchronize()
    for place, adapter in plan.adapters().items():
        assert all(torch.equal(adapter.to("cpu").delta(m), first[place].delta(m)) for m in adapter.modules)


@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
def test_decompose_and_save(mode: str, tmp_path: Path) -> None:
    pool = small()
    target = "adapter0" if mode == "iterative" else None
    for device in ("cpu", "cuda"):
        fl.decompose(pool, TAU, mode=mode, target=target, device=device).save(tmp_path / device)
    files = sorted(p.relative_to(tmp_path / "cpu") for p in (tmp_path / "cpu").rglob("adapter_config.json"))
    assert files
    for file in files:
        one, two = (fl.load((tmp_path / d / file).parent) for d in ("cpu", "cuda"))
        assert one.modules == two.modules
        for module in one.modules:
            delta = one.delta(module)
            assert (two.delta(module) - delta).norm() <= HALF * delta.norm() + FLOAT32


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": "soft", "chain": "palindrome"},
        {"threshold": "soft", "chain": "mean", "weighting": "energy"},
        {"threshold": TAU, "weighting": "energy", "mode": "pairs"},
    ],
    ids=["soft", "soft, weighed", "weighed"],
)
def test_chains_that_weigh(settings: dict[str, Any]) -> None:
    """The chain is the host's, blocks and results are of the device: there, brought there and streamed."""
    pool = small(torch.float32)
    wanted = fl.decompose(pool, **settings).adapters()
    made = [fl.decompose(pool.to("cuda"), **settings), fl.decompose(pool, device="cuda", memory="64KiB", **settings)]
    for place, adapter in wanted.items():
        for found in made:
            part = found.adapters()[place].to("cpu")
            for module in adapter.modules:
                size = max(float(a.delta(module).norm()) for a in pool.adapters)
                assert float((part.delta(module) - adapter.delta(module)).norm()) < 5 * SUMS32 * size, (place, module)


def test_parts_by_inputs_are_made_on_the_host() -> None:
    with pytest.raises(fl.InputError, match="by inputs are computed on the CPU; leave out device"):
        fl.decompose(small().to("cuda"), inputs="statistics")


def test_merge_and_overlap() -> None:
    pool = small(torch.float32)
    one, two = fl.merge(pool, rank=4), fl.merge(pool, rank=4, device="cuda").to("cpu")
    for module in one.modules:
        torch.testing.assert_close(two.delta(module), one.delta(module), rtol=MODEL32, atol=SUMS32)
    found, wanted = fl.overlap(pool, device="cuda"), fl.overlap(pool)
    torch.testing.assert_close(found.cosine, wanted.cosine, rtol=FLOAT32, atol=ROUNDED32)
    torch.testing.assert_close(found.subspace, wanted.subspace, rtol=FLOAT32, atol=ROUNDED32)


@pytest.mark.parametrize("mode", ["pool", "pairs"])
def test_streamed_through_little_memory(mode: str, tmp_path: Path) -> None:
    pool = small()
    fl.decompose(pool, TAU, mode=mode, device="cuda").save(tmp_path / "whole")
    fl.decompose(pool, TAU, mode=mode, device="cuda", memory="64KiB").save(tmp_path / "streamed")
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes(), file


def test_the_next_group_does_not_take_the_memory_of_one_in_use() -> None:
    """Copies run ahead of what is computed from groups that the host has let go of."""
    pool = make_pool(Workload({f"m{i}": (256, 256) for i in range(8)}, 2, 8, torch.float32))
    names, adapters, modules = pool.names, list(pool.adapters), pool.adapters[0].modules
    sums = []
    torch.cuda._sleep(100_000_000)
    with streams.streamed(streams.Stream(torch.device("cuda"), 1 << 20)):
        for part in streams.parts(names, adapters, [[m] for m in modules]):
            sums += [t.sum() for a in part.adapters for u in a.updates.values() for t in updates.tensors(u)]
            del part
    wanted = [t.sum() for m in modules for a in adapters for t in updates.tensors(a.updates[m])]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(wanted))


def test_messages() -> None:
    pool = small()
    with pytest.raises(fl.InputError, match=r"there are \d+ CUDA devices, numbered from 0"):
        pool.to("cuda:99")
    mixed = fl.Pool([pool["adapter0"].to("cuda"), pool["adapter1"], pool["adapter2"]])
    with pytest.raises(fl.InputError, match="on different devices"):
        fl.decompose(mixed)


def test_memory_that_runs_out_is_told() -> None:
    pool = make_pool(Workload(llama(1, 4096, 4096, 11008), 2, 64, torch.float32))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(fl.FastloraError, match=r"moving adapter .* the memory of the device does not suffice"):
            pool.to("cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
