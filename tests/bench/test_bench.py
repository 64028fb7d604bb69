"""The benchmarks are fair and honest: shapes of the real models, alternation, no wrong answer timed."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import gaussian
from tolerances import FLOAT64, SUMS32

import fastlora as fl
from fastlora.backends import torch as torch_backend
from fastlora.bench import cases, files, models, opponents, passes, small_files, table, timing, workloads
from fastlora.bench.contest import OURS, Contest, ContestRow, Task, Unavailable, measure, require, rows
from fastlora.bench.timing import Contender, Machine, Seconds, alternate, thread_counts
from fastlora.bench.workloads import WORKLOADS, Workload, make_pool, vit, write_pool
from fastlora.errors import InputError
from fastlora.ops import dispatch
from fastlora.ops.passes import CombineJob, CombineOutput, GramJob
from fastlora.views.benchmarks import bench_rows

TINY = Workload(vit(layers=2, hidden=64, mlp=96), 3, 8, torch.float32)
MACHINE = Machine({1: 2.0, 2: 4.0}, {1: 1.0, 2: 8.0}, {1: 1.0, 2: 2.0})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    return "tiny"


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        ("llama2-7b-8x16", 224, 6.48e9),
        ("llama3-70b-8x16", 560, 68.5e9),
        ("flux-4x32", 19 * 14 + 38 * 6, 11.8e9),
        ("vit-b32-8x16", 72, 84.9e6),
    ],
)
def test_workloads_have_the_linear_modules_of_the_real_models(name: str, modules: int, parameters: float) -> None:
    shapes = WORKLOADS[name].modules.values()
    assert len(shapes) == modules
    assert sum(math.prod(s) for s in shapes) == pytest.approx(parameters, rel=5e-3)


def test_sizes_of_workloads() -> None:
    assert WORKLOADS["llama2-7b-8x16"].bytes == 639_631_360
    assert WORKLOADS["llama3-70b-8x16"].bytes == pytest.approx(3.3e9, rel=0.01)
    assert WORKLOADS["llama3-70b-8x16"].head(2).bytes == 8 * 16 * 2 * (8192 + 8192 + 1024 + 8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_is_made(dtype: torch.dtype, tmp_path: Path) -> None:
    workload = replace(TINY, dtype=dtype)
    made, written = make_pool(workload), fl.Pool.load(write_pool(workload, tmp_path / "pool"))
    assert made.names == written.names and set(made.modules) == set(written.modules)
    for name in made.names:
        assert written[name].dtype == dtype
        for module in made.modules:
            assert torch.equal(made[name].delta(module), written[name].delta(module))
            one, two = made[name].updates[module], written[name].updates[module]
            assert torch.equal(one.A.stored, two.A.stored)  # type: ignore[arg-type]


def test_every_workload_shares_what_was_planted() -> None:
    spectrum = fl.decompose(make_pool(TINY)).spectrum
    assert all((values.real > 0.85).sum() == workloads.SHARED for values in spectrum.values())


def test_the_real_adapters_say_where_they_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(workloads.pool_of("minilm")) == 5
    monkeypatch.setattr(fl, "__file__", str(tmp_path / "site-packages" / "fastlora" / "__init__.py"))
    with pytest.raises(Unavailable, match="examples/adapters, which are not beside this installation"):
        workloads.pool_of("minilm")


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.0)
    seen: list[str] = []
    contenders = {
        "a": Contender(partial(seen.append, "a"), (1,), 3, partial(seen.append, "reset")),
        "b": Contender(lambda: (seen.append("b"), Seconds(2.0))[1], thread_counts()[:1], 2),
        "c": Contender(partial(seen.append, "c"), (1,), 1),
    }
    times = alternate(contenders)
    assert seen == [*("reset", "a", "b", "c"), *("reset", "a", "b"), *("reset", "a", "b"), "reset", "a"]
    assert {who: len(own) for (who, _), own in times.items()} == {"a": 3, "b": 2, "c": 1}
    assert times["b", 1] == [2.0, 2.0]


def test_a_round_repeats_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.25)
    seen: list[str] = []
    clock = 0.0

    def run(who: str, seconds: float) -> Seconds:
        nonlocal clock
        seen.append(who)
        clock += seconds
        return Seconds(len(seen))

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    contenders = {
        "short": Contender(partial(run, "short", 0.1), (1,), 2),
        "long": Contender(partial(run, "long", 0.3), (1,), 2),
        "reset": Contender(partial(run, "reset", 0.0), (1,), 2, lambda: None),
        "once": Contender(partial(run, "once", 0.0), (1,), 1),
    }
    times = alternate(contenders)
    first = [*("short",) * 3, "long", "reset", "once"]
    assert seen == [*first, *first[:-1], *first[:-1]]
    assert times["short", 1] == [8.0, 13.0] and times["long", 1] == [10.0, 15.0]  # medians of what the runs said


def test_threads_are_what_the_contender_asked_for() -> None:
    before, seen = torch.get_num_threads(), []
    alternate({"a": Contender(lambda: seen.append(torch.get_num_threads()), (1, 2), 1)})
    assert seen == [1, 2] and torch.get_num_threads() == before


def test_the_opponent_is_shown_at_its_best() -> None:
    theirs = Contender(lambda: Seconds(3.0 if torch.get_num_threads() == 1 else 5.0), (1, 2), 1)
    ours = Contender(lambda: Seconds(1.5 / torch.get_num_threads()), (1, 2), 1)
    task = Task(
        {OURS: ours, "torch": theirs}, moved=2.4, operations={torch.float32: 0.5, torch.float64: 1.0}, note="so"
    )
    (row,) = rows(Contest("x", ("torch",), lambda: task), MACHINE)
    assert row == ContestRow("x", {1: 1.5, 2: 0.75}, "torch, 1 thread", 3.0, {1: 1.5, 2: 0.6}, "so")
    assert table.cells(row) == (
        "x",
        "torch, 1 thread",
        "3 s",
        "1.5 s",
        "750 ms",
        "2.00 / 4.00",
        "2.00",
        "1.5 s / 600 ms",  # operations, bytes
        "1.00 / 1.25",
    )
    assert bench_rows(table.as_dict(MACHINE, [row])) == [
        ["what", "opponent", "theirs", "ours_1", "ours_2", "floor_1", "floor_2", "note"],
        ["x", "torch, 1 thread", 3.0, 1.5, 0.75, 1.5, 0.6, "so"],
    ]
    assert "* so." in table.as_markdown(MACHINE, [row])


def test_a_wrong_answer_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="a wrong answer is not timed"):
        require("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3)
    with pytest.raises(AssertionError, match="not timed"):
        require("x", torch.tensor([torch.nan]), torch.tensor([1.0]), 1e-3)


@pytest.mark.parametrize("memory", [True, False])
def test_small_files(memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both sides have done the same; a wrong answer is not timed, and nothing is left."""
    monkeypatch.setattr(small_files, "COUNT", 3)
    monkeypatch.setattr(small_files, "MEMORY", tmp_path / ("." if memory else "nothing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.0)
    for contest in cases.CASES["small-files"].contests():
        task, times = measure(contest)
        assert f"files in {tmp_path}" in task.note and all(min(own) > 0 for own in times.values())
    assert not list(tmp_path.iterdir())
    wrong = partial(small_files._prepare_loading, lambda paths: [fl.load(paths[0]) for _ in paths])
    with pytest.raises(AssertionError, match="a wrong answer is not timed"):
        measure(Contest("load", (small_files.LOAD,), wrong))


@pytest.mark.parametrize("case", ["gram", "combine", "decompose", "files"])
def test_cases_on_pools_run_on_any_workload(case: str, tiny: str) -> None:
    for contest in cases.CASES[case].contests([tiny]):
        task, times = measure(contest)
        assert {who for who, _ in times} == {OURS, *contest.opponents}
        assert all(len(own) >= 7 for own in times.values()) and task.moved > TINY.bytes // 4


def test_every_method_of_gram_blocks_is_checked(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contests = cases.CASES["methods"].contests([tiny])
    assert len(contests) >= 15 and not [c for c in contests if c.prepare().moved != TINY.bytes]
    right, calls = fl.merge, itertools.count(1)
    monkeypatch.setattr(fl, "merge", lambda pool, method: next(calls) * right(pool, method=method))
    with pytest.raises(AssertionError, match="not timed"):
        contests[0].prepare()


def test_a_wrong_decomposition_is_not_timed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = passes.unique_factors
    monkeypatch.setattr(passes, "unique_factors", lambda pool: [[1.01 * x for x in own] for own in right(pool)])
    (contest,) = passes.decompose(tiny)
    with pytest.raises(AssertionError, match="not timed"):
        contest.prepare()


def test_plain_torch_is_the_backend() -> None:
    """Inside alone; its passes are those of the backend, summed in float32."""
    assert opponents.in_plain_torch(dispatch.current_backend)() == "torch"
    assert opponents.in_plain_torch(dispatch.kernels)("torch") is opponents.KERNELS
    assert dispatch.current_backend() == "auto" and dispatch.kernels("torch") is torch_backend.KERNELS
    assert set(opponents.KERNELS) == set(torch_backend.KERNELS)
    x = gaussian(4000, 16, seed=1)
    out = torch.zeros(2, 16, 16, dtype=torch.float64)
    for own, kernels in zip(out, (torch_backend.KERNELS, opponents.KERNELS), strict=True):
        kernels["gram_pass"].launch([GramJob([x], [(0, 0, 0)], False, own, 16)])
    errors = ((out - x.double().mT @ x.double()).abs().amax((1, 2)) / 4000).tolist()
    assert errors[0] <= FLOAT64 < errors[1] <= SUMS32
    c, sums = gaussian(16, 16, seed=2, dtype=torch.float64), torch.zeros(2, 4000, 16)
    for own, kernels in zip(sums, (torch_backend.KERNELS, opponents.KERNELS), strict=True):
        kernels["combine_pass"].launch([CombineJob([x], [CombineOutput.into(own, [(0, c, 0, 1.0)])], False)])
    others = [int((own != (x.double() @ c).float()).sum()) for own in sums]  # float64 sums are rounded once
    assert others[0] <= 2 < others[1]


def test_the_bound_on_memory_is_checked(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PER_BYTE", tiny)
    (contest,) = files.memory(tiny)
    task = contest.prepare()
    assert "the same bits" in task.note and task.close is not None
    task.close()
    monkeypatch.setattr(files, "ALLOWED", 2**20)
    with pytest.raises(AssertionError, match="bytes were resident"):
        contest.prepare()


def test_an_adapter_in_the_weights_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, whole = models.apply("little", models.Sizes(layers=1, hidden=64, inner=96, keys=16, words=40))
    task, times = measure(alone)
    assert {who for who, _ in times} == {OURS, models.COPY} and "resident" in task.note
    assert task.operations[torch.float32] == 2 * 16 * (2 * 64 * 64 + 2 * 16 * 64 + 3 * 96 * 64)
    monkeypatch.setattr(models, "ALLOWED", 2**20)
    with pytest.raises(AssertionError, match="bytes were resident"):
        whole.prepare()


def test_selection() -> None:
    def whats(*names: str) -> list[str]:
        return [c.what for c in cases.select(names)]

    everything = whats()
    assert len(set(everything)) == len(everything)
    assert not [w for w in everything if "one 4096×4096" in w or "70b" in w]
    assert whats("gram") == ["gram pass, llama2-7b-8x16"]
    assert whats("decompose", "minilm") == ["decompose in memory, minilm"]
    assert len(whats("flux-4x32")) == 6 and all("flux-4x32" in w for w in whats("flux-4x32"))
    with pytest.raises(InputError, match="eigh takes no workload"):
        cases.select(["eigh", "minilm"])
