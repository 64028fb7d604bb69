"""Damaged single files: see ``single_files_cases.py``. ``make fuzz`` runs many more of them."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import single_files  # noqa: E402
import single_files_cases  # noqa: E402

COUNT = 300
FAILED_ONCE = [259, 419, 560, 10007282]
"""Numbers of cases that something was wrong with."""


def wrong(seeds: list[int] | range) -> list[str]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        found = [single_files.one(seed, Path(root)) for seed in seeds]
    return [f"{seed} {kind}: {what}" for seed, kind, _, what in found if what]


def test_cases() -> None:
    assert wrong(range(COUNT)) == []


def test_cases_that_failed_once() -> None:
    assert wrong(FAILED_ONCE) == []


def test_every_damage_is_among_them() -> None:
    kinds = {kind for seed in range(COUNT) for kind in single_files_cases.make(seed).kind.split(" + ")}
    assert kinds == {damage.__name__ for damage in single_files_cases.DAMAGES} | {"sound"}


def test_the_recorded_run_found_nothing() -> None:
    record = json.loads((HERE / "single_files.json").read_text())
    assert record["mutations"] >= 20_000 and record["violations"] == []
