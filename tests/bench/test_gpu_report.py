"""Results of a GPU as tables: only what was measured stands there, and how it stands to what was to be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_a_record_counts_more_than_a_first_window(tmp_path: Path) -> None:
    assert table.latest(tmp_path) is None
    for name, window, time in (("a-first", "first", "2027"), ("a", "record", "2026"), ("b", "record", "2025")):
        data = {"window": window, "facts": {"device": name, "time": time}, "rows": []}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(data), encoding="utf-8")
        found = table.latest(tmp_path)
        assert found is not None and found["facts"]["device"] == ("a-first" if name == "a-first" else "a")


def test_every_prediction_has_a_time() -> None:
    assert all(0 < p.seconds < 1e-2 for p in PREDICTIONS)
    assert len(table.prediction_table()) == 2 + len(PREDICTIONS)


def test_the_page_has_the_section() -> None:
    """Against forgetting: the section is written by the code that it is held against."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.endswith(table.section())
