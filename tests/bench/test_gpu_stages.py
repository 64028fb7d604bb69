"""Stages of a window with processes that are only named: what they start, and what they make of how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compiled import needs_kernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benches.gpu import building, measuring, prebuilt, profiling, testing  # noqa: E402
from benches.gpu.processes import Command, Failed, Shell, Skipped, TookTooLong  # noqa: E402
from benches.gpu.report import Report  # noqa: E402
from benches.gpu.running import Visit  # noqa: E402


@dataclass
class Named:
    """In the place of a shell: keeps the commands, and answers with what a function says."""

    answer: Callable[[Command], str]
    log: Path
    said: list[Command] = field(default_factory=list)

    def python_command(self, *arguments: str, **environment: str) -> Command:
        return Command(("python", *arguments), environment)

    def run(self, command: Command, limit: float) -> str:
        assert limit > 0
        self.said.append(command)
        return self.answer(command)


def visit_with(folder: Path, answer: Callable[[Command], str], stage: str = "tests") -> Any:
    visit = Visit(Report("first", folder), Named(answer, folder / "gpu.log"), folder, folder)  # type: ignore[arg-type]
    visit.report.facts = {"missing": [], "nvcc": "V13.0", "device": "A Made-Up GPU"}
    visit.stage = stage
    return visit


def fails(sentence: str, output: str = "", late: bool = False) -> str:
    raise (TookTooLong if late else Failed)(sentence, output)


# ---- build


def test_a_prepared_module_that_does_not_work_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = tmp_path / f"_core{prebuilt.suffix()}"
    prepared.write_bytes(b"no module")
    source = tmp_path / "source"
    (source / "fastlora").mkdir(parents=True)
    monkeypatch.setattr(building, "ROOT", source)
    monkeypatch.setattr(prebuilt, "unpack", lambda: 7)
    monkeypatch.setattr(prebuilt, "core", lambda: (prepared, ""))
    places = []

    def answer(command: Command) -> str:
        places.append((source / "fastlora" / prepared.name).exists())
        return fails("ended with 1", "ImportError: GLIBC_2.38 not found") if building.TRY in command.words else ""

    visit = visit_with(tmp_path, answer)
    said = building.run(visit, 60)
    assert "built here: the prepared one cannot be used (ImportError: GLIBC_2.38 not found)" in said
    assert visit.has_built and visit.report.facts["kernels prepared"] == 7
    assert places == [True, False, False]  # while it is tried, while another is built, when kernels are tried
    assert [c.words[1] for c in visit.shell.said] == ["-m", "setup.py", "-m"]
    assert visit.shell.said[1].environment == {"FASTLORA_CUDA": "ON", "FASTLORA_CUDA_ARCHS": "90-real"}
    with pytest.raises(Skipped, match="had to be built"):
        measuring.sweeps(visit, 60)


@needs_kernels
def test_a_module_without_kernels_or_a_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from benches.gpu import try_module

    for module, said in (
        (SimpleNamespace(has_cuda=False), "it has no CUDA kernels"),
        (SimpleNamespace(has_cuda=True, cuda_device_count=lambda: (0, "no driver")), "no device: no driver"),
        (SimpleNamespace(has_cuda=True, cuda_device_count=lambda: (1, "")), None),
    ):
        monkeypatch.setattr(try_module, "_core", module)
        assert try_module.main() == said


def test_a_prepared_module_whose_kernels_fail_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = tmp_path / f"_core{prebuilt.suffix()}"
    prepared.touch()
    (tmp_path / "fastlora").mkdir()
    monkeypatch.setattr(building, "ROOT", tmp_path)
    monkeypatch.setattr(prebuilt, "unpack", lambda: 0)
    monkeypatch.setattr(prebuilt, "core", lambda: (prepared, ""))
    checks = iter([False, True])

    def answer(command: Command) -> str:
        return fails("no kernel image") if building.CHECK in command.words and not next(checks) else ""

    visit = visit_with(tmp_path, answer)
    assert building.run(visit, 60) == "prepared beforehand; which did not work: no kernel image; built here"
    assert [c.words[-1] for c in visit.shell.said][-1] == building.CHECK and visit.has_built


# ---- tests


def test_the_first_test_that_failed_is_named(tmp_path: Path) -> None:
    def answer(command: Command) -> str:
        if "on_gpu" not in " ".join(command.words):
            return "12 passed in 3 s"
        Path(command.environment["FASTLORA_FAILING"]).write_text("tests/a.py::b\ntests/c.py::d\n")
        return fails("took more than 60 s", late=True)

    visit = visit_with(tmp_path, answer)
    with pytest.raises(Failed, match=r"2 failed, the first: tests/a\.py::b; ops: 12 passed") as caught:
        testing.tests(visit, 100)
    again = caught.value.again
    assert again is not None and again.words[-2:] == ("-x", "tests/a.py::b")
    first, second = visit.shell.said
    assert "-n" in first.words and first.environment["OMP_NUM_THREADS"] == "2"
    assert second.environment["FASTLORA_TEST_DEVICE"] == "cuda"


def test_a_sanitizer_that_cannot_finish_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "tool", lambda name: f"/bin/{name}")
    late = visit_with(tmp_path, lambda command: fails("took more than 30 s", "eigh 17\nsvd 17", late=True))
    with pytest.raises(Skipped, match="took more than 30 s, after: svd 17"):
        testing.memcheck(late, 30)
    with pytest.raises(Skipped, match="cannot be instrumented"):
        testing.racecheck(visit_with(tmp_path, lambda c: fails("ended with 1", "Error: Device not supported.")), 30)
    with pytest.raises(Failed, match="ended with 9"):
        testing.memcheck(visit_with(tmp_path, lambda c: fails("ended with 9: ERROR SUMMARY: 1 error")), 30)
    monkeypatch.setattr(testing, "tool", lambda name: None)
    with pytest.raises(Skipped, match="compute-sanitizer was not found"):
        testing.memcheck(late, 30)


# ---- measurements


def writes(visit: Any, *rows: dict[str, Any]) -> None:
    with visit.rows.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_rows_stay_though_the_process_was_stopped(tmp_path: Path) -> None:
    visit: Any = None

    def answer(command: Command) -> str:
        writes(visit, {"key": "copy", "bytes_per_second": 4e12}, {"key": "decompose", "failed": "RuntimeError: bad"})
        return fails("took more than 9 s", late=True)

    visit = visit_with(tmp_path, answer, "times")
    writes(visit, {"key": "of an earlier stage", "seconds": 1.0})
    with pytest.raises(Failed, match="decompose: RuntimeError: bad") as caught:
        measuring.cases("limits", "decompose")(visit, 10)
    assert [(row["key"], row["stage"]) for row in visit.report.rows] == [("copy", "times"), ("decompose", "times")]
    assert caught.value.again is not None and "decompose" in caught.value.again.words
    assert "limits" not in caught.value.again.words
    visit = visit_with(tmp_path, lambda command: fails("took more than 9 s", late=True), "times")
    with pytest.raises(TookTooLong):
        measuring.cases("limits")(visit, 10)


WORDY = """
import sys, pytest
code = pytest.main(sys.argv[3:])
print("last words")
raise SystemExit(code)
"""


@pytest.mark.parametrize(("test", "row"), [
    ("import pytest; pytest.importorskip('nothing_of_this_name')", {"skipped": "nothing_of_this_name"}),
    ("def test_a(): pass", {}), ("def test_a(): assert 0", {"failed": "ended with 1: last words"}),
])  # fmt: skip
def test_live_models_that_are_skipped_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test: str, row: Any
) -> None:
    (tmp_path / "wordy.py").write_text(WORDY)
    (tmp_path / "test_live.py").write_text(test)
    monkeypatch.setattr(measuring, "LIVE", str(tmp_path / "test_live.py"))
    shell = Shell(tmp_path / "gpu.log", (sys.executable, str(tmp_path / "wordy.py")))
    visit: Any = Visit(Report("first", tmp_path), shell, tmp_path, tmp_path)
    found = measuring._live(visit, measuring._start_live(visit), 60)
    assert found.keys() - {"form", "stage"} == row.keys()
    assert all(wanted in found[key] for key, wanted in row.items())


def test_a_form_that_failed_is_what_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visit: Any = None
    live = {"form": measuring.LIVE, "skipped": "1 skipped in 2 s"}
    monkeypatch.setattr(measuring, "_start_live", lambda visit: None)
    monkeypatch.setattr(measuring, "_live", lambda *_: live)
    rows: list[dict[str, Any]] = [{"form": "eigh 5", "error": 0.0, "allowed": 1.0}]

    def answer(command: Command) -> str:
        writes(visit, *rows)
        return fails("ended with 1") if len(rows) > 1 else ""

    visit = visit_with(tmp_path, answer, "smoke")
    assert measuring.smoke(visit, 40) == f"1 forms are right; {measuring.LIVE}: 1 skipped in 2 s"
    rows.append({"form": "svd 30x30", "failed": "ended by SIGKILL"})
    with pytest.raises(Failed, match="1 of 3 forms: svd 30x30: ended by SIGKILL") as caught:
        measuring.smoke(visit, 40)
    assert caught.value.again is not None and caught.value.again.words[-2:] == ("--forms", "svd 30x30")


def test_counters_that_cannot_be_read_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "tool", lambda name: f"/bin/{name}")
    visit = visit_with(tmp_path, lambda command: fails("ended with 1", "==ERROR== ERR_NVGPUCTRPERM"), "profiles")
    with pytest.raises(Skipped, match="cannot be read here"):
        profiling.run(visit, 20)

    def answer(command: Command) -> str:
        log = Path(command.words[command.words.index("--log-file") + 1])
        log.write_text('"Kernel Name","gpu__time_duration.sum"\n"","us"\n"eigh","4.5"\n')
        assert command.words[command.words.index("--clock-control") + 1] == "none"
        return ""

    visit = visit_with(tmp_path, answer, "profiles")
    assert profiling.run(visit, 20) == "1 kernels"
    assert visit.report.profile == [{"kernel": "eigh", "time": "4.5 us", "waits for": "", "stage": "profiles"}]
