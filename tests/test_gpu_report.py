"""Results of a GPU as tables: only what was measured stands there, and how it stands to what was to be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.bench import gpu_table
from fastlora.bench.targets import PREDICTIONS, TARGETS

ROOT = Path(__file__).resolve().parents[1]


def line(rows: list[dict[str, object]], key: str) -> str:
    place = next(i for i, t in enumerate(TARGETS) if t.key == key)
    return gpu_table.target_table(rows)[2 + place]


def test_nothing_measured() -> None:
    lines = gpu_table.target_table([])[2:]
    assert len(lines) == len(TARGETS)
    assert all(f"| {gpu_table.NOT_MEASURED} | – |" in own for own in lines)


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
    assert len(gpu_table.prediction_table()) == 2 + len(PREDICTIONS)


def test_the_page_has_the_section() -> None:
    """docs/benchmarks.md is what the code says, so no time stands there that is in no result."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.endswith(gpu_table.section())


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
    assert not list((tmp_path / "benches" / "results").iterdir())


def test_results_that_are_kept_are_of_a_device() -> None:
    for path in (ROOT / "benches" / "results").glob("gpu-*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        assert facts["device"] and facts["driver"] and facts["commit"] and facts["torch"], path
