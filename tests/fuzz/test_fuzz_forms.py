"""Weights in several forms: see ``forms_cases.py``. ``make fuzz`` runs many more of them."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import forms  # noqa: E402
import forms_cases  # noqa: E402

COUNT = 400
FAILED_ONCE = [20000545, 20000905, 20001084, 20001733]
"""Numbers of cases that something was wrong with."""


def wrong(seeds: list[int] | range) -> list[str]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        found = [(seed, *forms.one(seed, Path(root))) for seed in seeds]
    return [f"{seed} {about}: {what}" for seed, about, _, what in found if what]


def test_cases() -> None:
    assert wrong(range(COUNT)) == []


def test_cases_that_failed_once() -> None:
    assert wrong(FAILED_ONCE) == []


def test_every_form_is_among_them() -> None:
    made = [forms_cases.make(seed) for seed in range(COUNT)]
    adapters = [a for case in made for a in case.adapters]
    assert {a.qkv for a in adapters} == {"qkv_proj", "W_pack", "split"}
    assert {a.experts for a in adapters} == {"w", "proj", "fused", "older"}
    assert {case.verb for case in made} == set(forms_cases.VERBS)


def test_the_recorded_run_found_nothing() -> None:
    record = json.loads((HERE / "forms.json").read_text())
    assert record["cases"] >= 10_000 and record["violations"] == []
