"""Methods with factors on a device: nothing meets the CPU by accident, and results are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import merge_calls
import pools
import pytest
import torch
from compiled import ON_HOST
from simulated import DEVICE, OnDevice
from structures import pool_of, random_mix
from test_plan import ragged_pool
from tolerances import FLOAT32

import fastlora as fl
from fastlora.engine import buffers, stream, write
from fastlora.ops import dispatch


def same_files(one: Path, two: Path) -> None:
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert files and files == sorted(p.relative_to(two) for p in two.rglob("*.safetensors"))
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chain", ["product", "mean"])
@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
def test_decompose(mode: str, chain: str, side: str, device: None, tmp_path: Path) -> None:
    pool = ragged_pool(torch.bfloat16)
    settings = {"mode": mode, "chain": chain, "side": side, "target": "a0" if mode == "iterative" else None}
    fl.decompose(pool, 0.5, **settings).save(tmp_path / "cpu")  # type: ignore[arg-type]
    fl.decompose(pool.to("cuda"), 0.5, **settings).save(tmp_path / "device")  # type: ignore[arg-type]
    same_files(tmp_path / "cpu", tmp_path / "device")
    fl.decompose(pool, 0.5, device="cuda", **settings).save(tmp_path / "argument")  # type: ignore[arg-type]
    same_files(tmp_path / "cpu", tmp_path / "argument")


WEIGHED: dict[str, dict[str, Any]] = {
    "soft": {"threshold": "soft", "chain": "palindrome"},
    "soft, weighed": {"threshold": "soft", "chain": "mean", "weighting": "energy"},
    "weighed": {"threshold": 0.5, "weighting": "energy", "rank": 2},
}


@pytest.mark.parametrize("settings", WEIGHED.values(), ids=WEIGHED)
def test_chains_that_weigh(settings: dict[str, Any], device: None, tmp_path: Path) -> None:
    """The chain is the host's; blocks and results are of the device."""
    pool = ragged_pool(torch.bfloat16)
    fl.decompose(pool, **settings).save(tmp_path / "cpu")
    fl.decompose(pool.to("cuda"), **settings).save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")
    fl.decompose(pool, device="cuda", memory="2KiB", **settings).save(tmp_path / "streamed")
    same_files(tmp_path / "cpu", tmp_path / "streamed")


def test_the_best_of_several_merges(device: None) -> None:
    pool = ragged_pool()
    target = {m: torch.stack([a.delta(m) for a in pool.adapters if m in a.updates]).sum(0) for m in pool.modules}

    def score(adapter: fl.Adapter) -> float:
        own = adapter.to("cpu")
        return -float(sum((own.delta(m) - target[m]).norm() for m in own.modules))

    found, wanted = (fl.choose(p, score, methods=["pico"], rank=4) for p in (pool.to("cuda"), pool))
    assert [(r.point, r.scores) for r in found.sweep.rows] == [(r.point, r.scores) for r in wanted.sweep.rows]
    assert found.best.point == wanted.best.point and found.adapter.device == DEVICE
    assert all(torch.equal(found.adapter.to("cpu").delta(m), wanted.adapter.delta(m)) for m in pool.modules)


def test_parts_by_inputs_are_made_on_the_host(device: None) -> None:
    pool = ragged_pool()
    for moved, option in ((pool.to("cuda"), {}), (pool, {"device": "cuda"})):
        with pytest.raises(fl.InputError, match="by inputs are computed on the CPU; leave out device"):
            fl.decompose(moved, inputs="statistics", **option)  # type: ignore[arg-type]


MERGES: dict[str, Callable[[fl.Pool], fl.Adapter]] = {
    "svd by energy": lambda pool: fl.merge(pool, energy=0.9),
    "arithmetic": lambda pool: (0.5 * pool["a0"] - pool["a1"] / 3) + pool["a2"],
    "compress": lambda pool: (pool["a0"] + pool["a2"]).compress(rank=2),
    "unique part, compressed": lambda pool: fl.decompose(pool, 0.5).unique_of("a1").compress(rank=2),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merge(merge: Callable[[fl.Pool], fl.Adapter], device: None, tmp_path: Path) -> None:
    pool = ragged_pool()
    merge(pool).save(tmp_path / "cpu")
    found = merge(pool.to("cuda"))
    assert found.device == DEVICE
    found.save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")


def test_results_are_copied_while_others_are_written(
    device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module by module here: some are in the files before the last are on the host, and few are there at a time."""
    pool = pool_of(random_mix(3)[1])
    fl.decompose(pool, 0.5).save(tmp_path / "cpu")
    events: list[str] = []
    fetch, write_batch = stream.on_host, write.WriteBatch.write

    def fetched(adapters: Any, dtypes: Any) -> Any:
        events.append("fetched")
        return fetch(adapters, dtypes)

    def written(self: Any) -> None:
        write_batch(self)
        events.append("written")

    monkeypatch.setattr(stream, "on_host", fetched)
    monkeypatch.setattr(write.WriteBatch, "write", written)
    monkeypatch.setattr(write, "WRITE_BYTES", 1)
    fl.decompose(pool.to("cuda"), 0.5).save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")
    assert events.count("fetched") == events.count("written") == len(pool.modules) > 2 * write.PREPARED
    waiting = [events[: i + 1].count("fetched") - events[: i + 1].count("written") for i in range(len(events))]
    assert max(waiting) <= write.PREPARED + 1


def test_overlap(device: None) -> None:
    pool = ragged_pool()
    found, wanted = fl.overlap(pool.to("cuda")), fl.overlap(pool)
    assert torch.equal(found.cosine, wanted.cosine)
    assert torch.equal(found.subspace, wanted.subspace)
    assert not isinstance(found.cosine, OnDevice)


def test_one_buffer_an_adapter_and_aligned_views(device: None) -> None:
    pool = ragged_pool(torch.bfloat16).to("cuda")
    for adapter in pool.adapters:
        stored = [t.source for u in adapter.updates.values() for f in (u.B, u.A) for t in f.terms]
        assert len({t.untyped_storage().data_ptr() for t in stored}) == 1
        start = stored[0].untyped_storage().data_ptr()
        assert all((t.data_ptr() - start) % buffers.ALIGNMENT == 0 for t in stored)


def test_there_and_back_is_the_same_matrix(device: None) -> None:
    pool = ragged_pool()
    back = pool.to("cuda").to("cpu")
    assert back.device == torch.device("cpu")
    for one, two in zip(pool.adapters, back.adapters, strict=True):
        for module in one.modules:
            assert one.updates[module].B.stored is two.updates[module].B.stored
    assert pool["a0"].to("cpu") is pool["a0"]


def test_pools_on_different_devices_are_refused(device: None) -> None:
    pool = ragged_pool()
    mixed = fl.Pool([pool["a0"].to("cuda"), pool["a1"], pool["a2"]])
    for call in (fl.decompose, fl.overlap, fl.merge, fl.DecompositionPlan):
        with pytest.raises(fl.InputError, match=r"on different devices \('a0' on cuda:0, 'a1' on cpu\).*`pool.to"):
            call(mixed)
    with pytest.raises(fl.InputError, match=r"'a0' is on cuda:0 and 'a1' on cpu; move one of them"):
        mixed["a0"] + mixed["a1"]
    assert fl.decompose(mixed.to("cpu"), 0.5).shared.device == torch.device("cpu")
    assert fl.decompose(mixed, 0.5, device="cuda").shared.device == DEVICE


def test_what_has_no_matrices_goes_with_any_device(device: None) -> None:
    pool = ragged_pool()
    nothing = fl.decompose(pool, 0.999).shared
    assert not any(u.rank for u in nothing.updates.values())
    moved = fl.Pool([*(replace(pool[n].to("cuda"), name=n) for n in ("a0", "a1")), replace(nothing, name="nothing")])
    assert moved.device == DEVICE and moved.to("cuda").device == DEVICE
    found = fl.decompose(moved, 0.5).unique_of("a0")
    assert found.device == DEVICE
    for module, update in pool["a0"].updates.items():
        assert torch.equal(found.to("cpu").delta(module), fl.Adapter("x", {module: update}).delta(module))
    assert fl.PoolGram(moved).norms()["nothing"] == 0.0
    assert (moved["a0"] + nothing).device == (nothing - moved["a1"]).device == DEVICE
    assert fl.merge(moved, rank=3, device="cuda").device == DEVICE
    for granularity in ("column", "component", "matrix"):
        for first, second in ((moved["a0"], nothing), (nothing, moved["a0"])):
            half = fl.modulate(first, fl.dipm.interpolate(second, 0.5), granularity=granularity)
            for module in pool["a0"].modules:
                wanted = 0.5 * pool["a0"].delta(module)
                assert float((half.to("cpu").delta(module) - wanted).norm()) <= FLOAT32 * float(wanted.norm())


def equal_ranks() -> fl.Pool:
    """Three adapters of one rank, as the factors alone (``on="A"``, ``on="B"``) need them."""
    return fl.Pool(pools.make_adapter(f"a{i}", {pools.MODULE: u}) for i, u in enumerate(pools.planted(3, seed=4)))


@pytest.mark.parametrize("on", ["product", "B", "A"])
@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
@pytest.mark.parametrize("where", ["there", "argument", "streamed"])
def test_modulate(where: str, granularity: str, on: str, device: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"granularity": granularity, "on": on}

    def modulated(pool: fl.Pool, **settings: Any) -> fl.Adapter:
        a, b, c = pool.adapters
        return fl.modulate(a, [fl.dipm.shift(b, c, 0.3), fl.dipm.remove(c, 0.5), fl.dipm.scale(0.7)], **settings)

    pool = equal_ranks()
    modulated(pool, **settings).save(tmp_path / "cpu")
    if where == "there":
        found = modulated(pool.to("cuda"), **settings)
    else:
        found = modulated(pool, device="cuda", memory="1KiB" if where == "streamed" else None, **settings)
    assert found.device == (torch.device("cpu") if where == "streamed" else DEVICE)
    found.save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")


@pytest.mark.parametrize("rank", [2, None])
def test_modulate_moves_every_adapter_once(rank: int | None, device: None, tmp_path: Path) -> None:
    a, b = ragged_pool().adapters[:2]
    operators = [fl.dipm.shift(b, b, 0.3), fl.dipm.interpolate(b, 0.2), fl.dipm.remove([a, b], 0.1)]
    fl.modulate(a, operators, rank=rank).save(tmp_path / "cpu")
    fl.modulate(a, operators, rank=rank, device="cuda").save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")


EXPRESSIONS = [
    "0.6*a + 0.4*b - 0.3*unique(c | a, b)",
    "compress(a - shared(a, b, threshold=0.3), 2)",
    "negate(compress(a, energy=0.9), 0.5) + analogy(a, b, c)",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("where", ["there", "argument", "streamed", "bounded"])
def test_compose(where: str, expression: str, device: None, tmp_path: Path) -> None:
    def named(pool: fl.Pool) -> dict[str, fl.Adapter]:
        return dict(zip("abc", pool.adapters, strict=True))

    pool = ragged_pool()
    fl.compose(expression, named(pool)).save(tmp_path / "cpu")
    if where == "there":
        found = fl.compose(expression, named(pool.to("cuda")))
    else:
        memory = {"argument": None, "streamed": "1KiB", "bounded": "1GiB"}[where]
        found = fl.compose(expression, named(pool), device="cuda", memory=memory)
    assert found.device == (DEVICE if where in ("there", "argument") else torch.device("cpu"))  # type: ignore[union-attr]
    found.save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")


def test_other_kinds_are_not_computed_on_a_device(device: None) -> None:
    vector = fl.TaskVector("v", {"w.weight": torch.ones(2, 2)})
    with pytest.raises(fl.InputError, match=r"device='cuda:0': only LoRA adapters .* this is a task vector"):
        fl.compose("2*v", {"v": vector}, device="cuda")
    assert fl.compose("2*v", {"v": vector}, device="cpu").kind == "a task vector"


@pytest.mark.parametrize("where", ["there", "argument", "streamed", "host"])
@pytest.mark.parametrize("method", fl.methods())
def test_every_merge_method(method: str, where: str, device: None, tmp_path: Path) -> None:
    """On the device, brought there, streamed through memory that no pool fits into, and brought back: the files are
    the same."""
    pool = equal_ranks() if method in merge_calls.OF_EQUALS else ragged_pool()
    merge_calls.called(method, pool).save(tmp_path / "cpu")
    if where == "there":
        found = merge_calls.called(method, pool.to("cuda"))
    elif where == "host":
        found = merge_calls.called(method, pool.to("cuda"), device="cpu")
    else:
        memory = "1KiB" if where == "streamed" else None
        found = merge_calls.called(method, pool, device="cuda", memory=memory)
    # What does not fit on the device is written from the host.
    assert found.device == (torch.device("cpu") if where in ("streamed", "host") else DEVICE)
    found.save(tmp_path / "device")
    same_files(tmp_path / "cpu", tmp_path / "device")


def test_compress_streamed_through_little_memory(device: None, tmp_path: Path) -> None:
    adapter = ragged_pool()["a0"]
    fl.compress(adapter, 2).save(tmp_path / "cpu")
    fl.compress(adapter, 2, device="cuda", memory="1KiB").save(tmp_path / "streamed")
    same_files(tmp_path / "cpu", tmp_path / "streamed")


def test_what_is_streamed_is_read_on_the_device(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram passes of a bounded merge see tensors of the device, one module after another."""
    seen: list[int] = []
    run = dispatch.run_pass

    def counted(op: str, jobs: Any) -> Any:
        if op == "gram_pass":
            assert all(isinstance(f, OnDevice) for job in jobs for f in job.factors)
            seen.append(len(jobs))
        return run(op, jobs)

    monkeypatch.setattr("fastlora.engine.gram.run_pass", counted)
    fl.merge(ragged_pool(), rank=2, device="cuda", memory="1KiB")
    assert len(seen) >= 3


@pytest.mark.parametrize("seed", range(4))
def test_updates_of_every_structure(seed: int, device: None) -> None:
    """Sums, parts and empty updates beside each other, on the device and streamed through it: as on the CPU."""
    _, mix = random_mix(seed)
    pool = pool_of(mix)
    for chain, threshold in (("product", 0.5), ("mean", 0.8)):
        wanted = fl.decompose(pool, threshold, chain=chain).adapters()
        for found in (
            fl.decompose(pool.to("cuda"), threshold, chain=chain),
            fl.decompose(pool, threshold, chain=chain, device="cuda", memory="2KiB"),
        ):
            for place, part in found.adapters().items():
                for module in pool.modules:
                    x, y = part.to("cpu").delta(module), wanted[place].delta(module)
                    assert float((x - y).norm()) <= FLOAT32 * float(pool["a0"].delta(module).norm() + y.norm()), place
    for method in ("equal_energy", "least_interference"):
        assert fl.weights(pool.to("cuda"), method) == pytest.approx(fl.weights(pool, method), abs=FLOAT32)


def test_all_pairs(device: None) -> None:
    pool = ragged_pool()
    moved = pool.to("cuda")
    assert fl.weights(moved, "least_interference") == fl.weights(pool, "least_interference")
    found, wanted = (fl.PoolGram(p).merge({"a0": 0.5, "a2": 1.0}, rank=2) for p in (moved, pool))
    assert found.device == DEVICE
    for module in wanted.modules:
        assert torch.equal(found.to("cpu").delta(module), wanted.delta(module))


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu"])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(fl.InputError, match="does not exist: use auto, cpu, cuda or cuda:N"):
        ragged_pool().to(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_here_is_told_with_the_reason() -> None:
    for call in (
        lambda p: p.to("cuda"),
        lambda p: fl.decompose(p, device="cuda:1"),
        lambda p: fl.merge(p, device="cuda"),
    ):
        with pytest.raises(fl.InputError, match=r"cannot be used: torch .*Use cpu"):
            call(ragged_pool())


def test_memory_that_runs_out_is_told() -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    of_host = dispatch.kernels(ON_HOST[0])
    assert not isinstance(of_host, str)
    message = "the memory of the device does not suffice"
    with dispatch.use_kernels(ON_HOST[0], {op: replace(k, launch=full) for op, k in of_host.items()}):
        with pytest.raises(fl.FastloraError, match=rf"fastlora.eigh: {message}.*--memory"):
            fl.ops.eigh(torch.eye(3))
        with pytest.raises(fl.FastloraError, match=rf"fastlora.gram_pass: {message}"):
            fl.decompose(ragged_pool())


@pytest.mark.parametrize("mode", ["pool", "pairs", "iterative"])
@pytest.mark.parametrize("memory", ["1KiB", "12KiB"])
def test_streamed_through_little_memory(mode: str, memory: str, device: None, tmp_path: Path) -> None:
    """Modules one by one, and some at once: the bits of the results do not change."""
    pool = ragged_pool(torch.bfloat16)
    target = "a0" if mode == "iterative" else None
    fl.decompose(pool, 0.5, mode=mode, target=target).save(tmp_path / "whole")
    found = fl.decompose(pool, 0.5, mode=mode, target=target, device="cuda", memory=memory)
    assert found.stream is not None and found.stream.device == DEVICE
    found.save(tmp_path / "streamed")
    same_files(tmp_path / "whole", tmp_path / "streamed")


def test_what_fits_is_not_streamed(device: None) -> None:
    found = fl.decompose(ragged_pool(), 0.5, device="cuda", memory="1GiB")
    assert found.stream is None and found.pool.device == DEVICE
