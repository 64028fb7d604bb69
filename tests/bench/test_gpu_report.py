"""Results of a GPU as tables: only what was measured stands there, and how it stands to what was to be reached."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.bench.gpu import table
from fastlora.bench.gpu.targets import PREDICTIONS, TARGETS

ROOT = Path(__file__).resolve().parents[2]


def line(rows: list[dict[str, object]], key: str) -> str:
    place = next(i for i, t in enumerate(TARGETS) if t.key == key)
    return table.target_table(rows)[2 + place]


def test_nothing_measured() -> None:
    lines = table.target_table([])[2:]
    assert len(lines) == len(TARGETS)
    assert all(f"| {table.NOT_MEASURED} | – |" in own for own in lines)


@pytest.mark.parametrize(("row", "shown"), [
    ({"key": "decompose", "seconds": 0.9e-3, "floor": 3e-4}, "| 300 µs | 3 ms | 1 ms | 900 µs | aim |"),
    ({"key": "decompose", "seconds": 2e-3, "floor": 3e-4}, "| 2 ms | must |"),
    ({"key": "decompose", "seconds": 4e-3, "floor": 3e-4}, "| 4 ms | no |"),
    ({"key": "gram", "seconds": 1.4e-3, "floor": 1e-3}, "| 1.4 ms (1.40 ×) | must |"),
    ({"key": "eigh 16 cupy", "seconds": 1e-4, "opponent": 1.1e-3}, "| 100 µs (11.00 ×) | aim |"),
    ({"key": "eigh 16 cupy", "seconds": 1e-4, "opponent": 1e-4}, "| 100 µs (1.00 ×) | no |"),
    ({"key": "eigh 16 cupy", "skipped": "CuPy is not installed"}, "| not measured: CuPy is not installed | – |"),
    ({"key": "svd 16 torch", "seconds": 1e-4}, "| not measured | – |"),
])  # fmt: skip
def test_how_a_measurement_stands(row: dict[str, object], shown: str) -> None:
    assert shown in line([row], str(row["key"]))


def test_every_prediction_has_a_time() -> None:
    assert all(0 < p.seconds < 1e-2 for p in PREDICTIONS)
    assert len(table.prediction_table()) == 2 + len(PREDICTIONS)


def test_the_page_has_the_section() -> None:
    """Against forgetting: the section is written by the code that it is held against."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.endswith(table.section())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_written(tmp_path: Path) -> None:
    """The whole command, on a copy of what it needs: it says what is missing and names the stage by its exit code."""
    for name in ("fastlora", "benches"):
        (tmp_path / name).mkdir()
    (tmp_path / "fastlora" / "bench").symlink_to(ROOT / "fastlora" / "bench")
    (tmp_path / "fastlora" / "__init__.py").touch()
    script = tmp_path / "benches" / "gpu.py"
    script.write_text((ROOT / "benches" / "gpu.py").read_text(encoding="utf-8"), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 10, done.stdout + done.stderr
    assert "environment: failed torch finds no CUDA device" in done.stdout
    assert "benches: skipped needs build" in done.stdout
    assert [p.name for p in (tmp_path / "benches" / "results").iterdir()] == ["gpu.log"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """benches/gpu.py as a module that writes elsewhere."""
    spec = importlib.util.spec_from_file_location("gpu_command", ROOT / "benches" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_command", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_what_was_found_before_a_failure_is_written(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def found(report: Any, limit: float) -> str:
        report.facts = {"device": "A Made-Up GPU", "driver": "1", "commit": "abc", "torch": "2"}
        return ""

    def timed(report: Any, limit: float) -> str:
        report.rows = [{"key": "decompose", "seconds": 2e-3, "floor": 1e-3}]
        raise command.Failed("eigh (AssertionError: wrong)")

    stages = {
        "environment": (found, 10, 10, ()),
        "tests": (lambda report, limit: 1 / 0, 12, 10, ("environment",)),
        "benches": (timed, 14, 10, ("environment",)),
        "sanitizer": (lambda report, limit: "", 13, 10, ("tests",)),
    }
    monkeypatch.setattr(command, "STAGES", stages)
    assert command.main() == 12
    written = json.loads((tmp_path / "gpu-a-made-up-gpu.json").read_text(encoding="utf-8"))
    assert [(s["stage"], s["result"]) for s in written["stages"]] == [
        ("environment", "done"), ("tests", "failed"), ("benches", "failed"), ("sanitizer", "skipped"),
    ]  # fmt: skip
    assert written["rows"][0]["key"] == "decompose"
    page = (tmp_path / "gpu-a-made-up-gpu.md").read_text(encoding="utf-8")
    assert "device A Made-Up GPU; driver 1;" in page and "| 2 ms | must |" in page
    assert "ZeroDivisionError" in page and "eigh (AssertionError: wrong)" in page


def test_what_a_stage_leaves_of_its_limit_goes_to_the_next(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def quick(report: Any, limit: float) -> str:
        limits.append(limit)
        return ""

    needing = {"build": ("environment",), "tests": ("absent",)}
    seconds = {"environment": 40.0, "build": 150.0, "tests": 100.0, "benches": 5.0, "sanitizer": 900.0}
    stages = {name: (quick, 1, limit, needing.get(name, ())) for name, limit in seconds.items()}
    monkeypatch.setattr(command, "STAGES", stages)
    assert command.main() == 0
    assert limits == pytest.approx([40, 190, 295, command.WHOLE], abs=5)


def test_commands_are_stopped_at_their_limit(command: Any) -> None:
    early = [sys.executable, "-I", "-S", "-c", "import time; print('early', flush=True); time.sleep(600)"]
    with pytest.raises(command.TookTooLong, match="took more than 3 s"):
        command.run(early, 3)  # a hundred times what starting that takes
    assert "early" in (command.RESULTS / "gpu.log").read_text(encoding="utf-8")
    with pytest.raises(command.Failed, match="ended with 3: last words"):
        command.run([sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"], 60)
