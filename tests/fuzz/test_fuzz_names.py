"""Names and conventions: see ``names.py`` and ``names_cases.py``. ``make fuzz`` runs 10,000 of them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from fastlora.adapters import alignment
from fastlora.adapters.towers import Tower
from fastlora.formats.peft import keys

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import names  # noqa: E402

COUNT = 300
FAILED_ONCE = [
    11,
    22,
    39,
    66,
    97,
    144,
    180,
    265,
    285,
    357,
    363,
    491,
    506,
    622,
    762,
    868,
    944,
    953,
    994,
    10000728,
    10001255,
]
"""Numbers of cases that something was wrong with."""


def violations(seeds: Iterable[int]) -> list[str]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        found = [(seed, *names.one(seed, Path(root))) for seed in seeds]
    return [f"{seed} {about}: {what}" for seed, about, _, what in found if what]


def test_names_and_conventions() -> None:
    assert violations(range(COUNT)) == []


def test_names_that_failed_once() -> None:
    assert violations(FAILED_ONCE) == []


def test_two_towers_that_are_joined_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer can fail: here towers are one whose names end alike."""

    def careless(towers: dict[str, Tower], settled: set[str]) -> list[list[str]]:
        ends: dict[str, list[str]] = {}
        for root in towers:
            ends.setdefault(root.rpartition(".")[2], []).append(root)
        return [roots for roots in ends.values() if len(roots) > 1]

    monkeypatch.setattr(alignment, "same_towers", careless)
    assert any("nobody's update" in v or "missing" in v for v in violations(range(60)))


def test_modules_that_stay_two_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "WRAPPERS", frozenset())
    keys.parse_key.cache_clear()
    assert violations(range(60))
    keys.parse_key.cache_clear()


def test_the_committed_result_is_clean() -> None:
    result = json.loads((HERE / "names.json").read_text())
    assert result["cases"] >= 10_000 and result["violations"] == []
