"""The two windows of ``make gpu``: limits that add up, what is kept when one is cut off, what is taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benches.gpu import failures, running  # noqa: E402
from benches.gpu.processes import Command, Failed, Shell, Skipped, TookTooLong  # noqa: E402
from benches.gpu.report import Report  # noqa: E402
from benches.gpu.windows import START, WHOLE, WINDOWS, Stage, Window  # noqa: E402

FACTS = {"device": "A Made-Up GPU", "driver": "1", "commit": "abc", "torch": "2", "time": "2026"}


def visit_in(folder: Path, window: str = "first") -> running.Visit:
    (folder / window).mkdir(parents=True, exist_ok=True)
    shell = Shell(folder / window / "gpu.log")
    return running.Visit(Report(window, folder), shell, folder / window, folder)


def name_device(visit: running.Visit, limit: float) -> str:
    visit.report.facts = dict(FACTS)
    return ""


def stage(name: str, run: Callable[[Any, float], str], code: int = 1, **options: Any) -> Stage:
    return Stage(name, run, code, **{"limit": 10.0, "most": 1e3, "needs": (), **options})


# ---- limits


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_the_limits_of_the_stages_add_up(window: Window) -> None:
    assert sum(s.limit for s in window.stages) <= window.limit < window.seconds
    names = [s.name for s in window.stages]
    for i, own in enumerate(window.stages):
        assert set(own.needs) <= set(names[:i]) and own.limit <= own.most and own.least <= own.most
        # Each is begun even where all before it take what is their own.
        assert own.least <= own.limit or own.name == "sweeps"
    assert len(set(names)) == len(names)


def test_both_windows_fit_the_time_that_a_device_is_lent_for() -> None:
    assert list(WINDOWS) == ["first", "record"]
    assert WINDOWS["first"].seconds <= 330 and WINDOWS["record"].seconds <= 400
    assert sum(w.seconds + START for w in WINDOWS.values()) <= WHOLE


class Time:
    """A clock that goes on when a stage says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def takes(self, seconds: float, limits: list[float]) -> Callable[[Any, float], str]:
        def run(visit: Any, limit: float) -> str:
            limits.append(limit)
            self.now += min(seconds, limit)
            return ""

        return run


def test_what_a_stage_leaves_goes_to_those_after_it(tmp_path: Path) -> None:
    clock, limits = Time(), list[float]()
    window = Window("first", 110, (
        stage("facts", clock.takes(2, limits), limit=10),
        stage("build", clock.takes(500, limits), limit=50, most=55),  # takes all it gets
        stage("smoke", clock.takes(5, limits), limit=20),
        stage("tests", clock.takes(500, limits), limit=15),
        stage("late", clock.takes(1, limits), limit=5),
    ))  # fmt: skip
    assert running.run(window, visit_in(tmp_path), now=lambda: clock.now) == 0
    assert limits == [10, 55, 23, 33, 5]  # of the 3 s that build may not have, smoke and tests profit
    assert clock.now <= 1000 + window.limit


def test_a_stage_is_not_begun_with_too_little(tmp_path: Path) -> None:
    clock, limits = Time(), list[float]()
    window = Window("first", 110, (
        stage("build", clock.takes(500, limits), limit=90),
        stage("sweeps", clock.takes(1, limits), limit=0, least=20),
        stage("last", clock.takes(1, limits), limit=10),
    ))  # fmt: skip
    visit = visit_in(tmp_path)
    assert running.run(window, visit, now=lambda: clock.now) == 0
    assert [s.result for s in visit.report.stages] == ["done", "skipped", "done"] and limits == [90, 10]
    assert visit.report.stages[1].detail == "0 s were left, it is not begun with less than 20 s"


def test_limits_are_multiplied_where_there_is_no_device(tmp_path: Path) -> None:
    clock, limits = Time(), list[float]()
    window = Window("first", 110, (stage("a", clock.takes(900, limits)), stage("b", clock.takes(900, limits), most=15)))
    running.run(window, visit_in(tmp_path), slower=10, now=lambda: clock.now)
    assert limits == [100, 100]


# ---- what is written


def test_what_was_found_before_a_failure_is_written(tmp_path: Path) -> None:
    def timed(visit: running.Visit, limit: float) -> str:
        visit.report.rows.append({"key": "decompose", "seconds": 2e-3, "floor": 1e-3, "stage": "benches"})
        raise Failed("eigh (AssertionError: | wrong)")

    window = Window("record", 100, (
        stage("facts", name_device, 10),
        stage("tests", lambda visit, limit: str(1 // 0), 12, needs=("facts",)),
        stage("benches", timed, 14, needs=("facts",)),
        stage("memcheck", lambda visit, limit: "", 13, needs=("tests",)),
    ))  # fmt: skip
    assert running.run(window, visit_in(tmp_path, "record")) == 12
    written = json.loads((tmp_path / "gpu-a-made-up-gpu.json").read_text(encoding="utf-8"))
    assert [(s["stage"], s["result"]) for s in written["stages"]] == [
        ("facts", "done"), ("tests", "failed"), ("benches", "failed"), ("memcheck", "skipped"),
    ]  # fmt: skip
    assert written["rows"][0]["key"] == "decompose" and written["facts"] == FACTS
    page = (tmp_path / "gpu-a-made-up-gpu.md").read_text(encoding="utf-8")
    assert "device A Made-Up GPU; driver 1;" in page and "| 2 ms | must |" in page
    assert "ZeroDivisionError" in page and "eigh (AssertionError: / wrong)" in page and "needs tests" in page


CUT = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from test_gpu_windows import Path, Window, name_device, running, stage, visit_in
def hangs(visit, limit):
    visit.report.rows.append({"key": "half", "seconds": 1.0})
    print("hangs", flush=True)
    time.sleep(600)
def timed(visit, limit):
    visit.report.rows.append({"key": "whole", "seconds": 1.0})
    return "a row"
stages = stage("facts", name_device), stage("times", timed), stage("tests", hangs), stage("more", timed)
running.run(Window("first", 100, stages), visit_in(Path(sys.argv[3])))
"""


def test_a_call_that_is_cut_off_loses_one_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CUT, str(ROOT), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("hangs" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    written = json.loads((tmp_path / "gpu-a-made-up-gpu-first.json").read_text(encoding="utf-8"))
    results = [(s["stage"], s["result"]) for s in written["stages"]]
    assert results == [("facts", "done"), ("times", "done"), ("tests", "cut off")]
    assert [row["key"] for row in written["rows"]] == ["whole"]
    assert "| tests | cut off |" in (tmp_path / "gpu-a-made-up-gpu-first.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("commit", "again"), [("abc", ["facts", "tests"]), ("other", ["facts", "times", "tests"])])
def test_a_window_is_taken_up_where_it_was_cut(tmp_path: Path, commit: str, again: list[str]) -> None:
    done: list[str] = []

    def note(visit: running.Visit, limit: float) -> str:
        done.append(visit.stage)
        if visit.stage == "times":
            visit.report.rows.append({"key": "decompose", "seconds": float(len(done)), "stage": "times"})
        if visit.stage == "tests" and len(done) == 3:
            raise Failed("cut")
        return "said"

    def facts(visit: running.Visit, limit: float) -> str:
        name_device(visit, limit)
        if len(done) == 3:
            visit.report.facts["commit"] = commit
        return note(visit, limit)

    window = Window("first", 100, (stage("facts", facts, lasts=False), stage("times", note), stage("tests", note)))
    running.run(window, visit_in(tmp_path))
    assert done == ["facts", "times", "tests"]
    visit = visit_in(tmp_path)
    assert running.run(window, visit, resume=True) == 0
    assert done[3:] == again
    assert [row["seconds"] for row in visit.report.rows] == [2.0 if commit == "abc" else 5.0]
    assert visit.report.stages[1].result == ("done earlier" if commit == "abc" else "done")


def test_a_window_that_is_cut_off_twice_keeps_what_the_first_found(tmp_path: Path) -> None:
    done: list[str] = []

    def note(visit: running.Visit, limit: float) -> str:
        done.append(visit.stage)
        visit.report.rows.append({"key": visit.stage, "stage": visit.stage})
        if done in (["times", "tests"], ["times", "tests", "build"]):
            raise KeyboardInterrupt
        return ""

    build = stage("build", lambda visit, limit: note(visit, limit) if "tests" in done else "", lasts=False)
    facts = stage("facts", name_device, lasts=False)
    window = Window("first", 100, (facts, build, stage("times", note), stage("tests", note)))
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            running.run(window, visit_in(tmp_path), resume=resume)
    assert running.run(window, visit_in(tmp_path), resume=True) == 0
    assert done == ["times", "tests", "build", "build", "tests"]
    written = json.loads((tmp_path / "gpu-a-made-up-gpu-first.json").read_text(encoding="utf-8"))
    assert [s["result"] for s in written["stages"]] == ["done", "done", "done earlier", "done"]
    assert [row["key"] for row in written["rows"]] == ["build", "times", "tests"] and not written["before"]


def test_the_files_get_the_name_that_torch_gives_the_device(tmp_path: Path) -> None:
    def rename(visit: running.Visit, limit: float) -> str:
        visit.report.facts["device"] = "Better (80 GB)"
        return ""

    running.run(Window("first", 100, (stage("facts", name_device), stage("build", rename))), visit_in(tmp_path))
    assert {path.stem for path in tmp_path.glob("gpu-*")} == {"gpu-better-80-gb-first"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_written(tmp_path: Path) -> None:
    """The whole command: it says what is missing, in seconds, and builds nothing."""
    command = [sys.executable, "-m", "benches.gpu", "first", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 11, done.stdout + done.stderr
    assert "build: failed torch finds no CUDA device" in done.stdout
    assert "tests: skipped needs build" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["first"]


# ---- commands


def has_ended(process: int) -> bool:
    """Whether a process of somebody else is gone, or only waits to be collected."""
    for _ in range(6000):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_commands_are_stopped_at_their_limit_with_all_they_started(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "log")
    script = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    )
    running = shell.start(Command((sys.executable, "-I", "-S", "-c", script)))
    while not running.output().endswith("\n"):  # it has started what it starts
        assert running.process.poll() is None
        time.sleep(0.01)
    with pytest.raises(TookTooLong, match="took more than 1 s") as caught:
        running.result(1)
    assert has_ended(int(caught.value.output))
    with pytest.raises(Failed, match="ended with 3: last words") as failed:
        shell.run(Command((sys.executable, "-c", "import sys; print('last words'); sys.exit(3)")), 60)
    assert failed.value.again is not None and failed.value.again.words[0] == sys.executable


def test_what_failed_is_run_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch by launch, then under memcheck where there is one; the last forty lines stand in the report."""
    visit = visit_in(tmp_path)
    visit.report.facts = dict(FACTS)
    script = "import os; [print(i, os.environ['CUDA_LAUNCH_BLOCKING']) for i in range(60)]; raise SystemExit(1)"
    visit.again["tests"] = visit.shell.python_command("-c", script)
    monkeypatch.setattr(failures, "sanitizer", lambda command, check: command.under("env", CUDA_LAUNCH_BLOCKING=check))
    said = failures.run(visit, 60)
    assert said.count("ended with 1") == 2
    first, second = visit.report.failures
    assert (first["stage"], first["how"], second["how"]) == ("tests", "launch by launch", "memcheck")
    assert first["output"].splitlines() == [f"{i} 1" for i in range(20, 60)]
    assert second["output"].splitlines()[-1] == "59 memcheck" and second["command"].startswith("CUDA_LAUNCH_BLOCKING=")
    page = (tmp_path / "gpu-a-made-up-gpu-first.md").read_text(encoding="utf-8")
    assert "## tests, launch by launch" in page and "59 1" in page and "\n19 1" not in page

    def none_here(command: Command, check: str) -> Command:
        raise Skipped("compute-sanitizer was not found")

    monkeypatch.setattr(failures, "sanitizer", none_here)
    assert "tests, memcheck: compute-sanitizer was not found" in failures.run(visit, 60)
    visit.again.clear()
    with pytest.raises(Skipped, match="nothing failed"):
        failures.run(visit, 60)


def test_a_test_that_fails_is_written_down_at_once(tmp_path: Path) -> None:
    """A run of pytest that is stopped tells of no failure."""
    (tmp_path / "test_two.py").write_text("def test_a(): assert 0\ndef test_b(): import os; os._exit(9)\n")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**own, "PYTHONPATH": str(ROOT), "FASTLORA_FAILING": str(tmp_path / "failing")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benches.gpu.failing", "-c", os.devnull, "test_two.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 9, done.stdout
    assert (tmp_path / "failing").read_text() == "test_two.py::test_a\n"


def test_what_was_started_ends_with_the_window(tmp_path: Path) -> None:
    """A machine that takes its time back says so by SIGTERM."""
    slow = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    script = """
import signal, sys
from benches.gpu.processes import Command, Path, Shell
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
Shell(Path(sys.argv[1]) / "log").run(Command((sys.executable, "-c", sys.argv[2], sys.argv[1] + "/child")), 600)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path), slow], env=environment) as process:
        child = tmp_path / "child"
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(600) == 143
    assert has_ended(int(child.read_text()))
