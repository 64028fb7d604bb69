"""Hostile adapter directories: see ``mutate.py``. ``make fuzz`` runs many more of them."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fastlora.core.patterns import Patterns
from fastlora.errors import FastloraError, InputError

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import cases  # noqa: E402
import damaged_config  # noqa: E402
import run  # noqa: E402

COUNT = 3000
FAILED_ONCE = [
    14, 17, 28, 71, 119, 145, 161, 171, 211, 275, 301, 342, 349, 364, 497, 529, 560, 567, 593, 843, 872, 1467,
    30000163, 30000352, 30000368, 30000704,
]  # fmt: skip
"""Numbers of mutations that something was wrong with."""


def violations(seeds: list[int] | range) -> list[str]:
    # In memory where that is possible: making and removing directories would take most of the time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        return [f"{seed} {kind}: {what}" for seed, kind, _, what in run.run(seeds, Path(root).resolve()) if what]


def test_mutations() -> None:
    assert violations(range(COUNT)) == []


def test_mutations_that_failed_once() -> None:
    assert violations(FAILED_ONCE) == []


@pytest.mark.parametrize("template", cases.SHAPES)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_what_is_healthy_is_accepted(tmp_path: Path, template: str, dtype: str) -> None:
    run.prepare(tmp_path)
    assert run.check(cases.healthy(template, 7, dtype), tmp_path) == "accepted"


def test_a_worker_that_dies_or_hangs_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "one", lambda seed, root: {1: lambda: run.os._exit(9), 2: lambda: time.sleep(600)}[seed]())
    (died,) = violations([1])
    monkeypatch.setattr(run, "LIMIT_S", 1.0)
    (hung,) = violations([2])
    assert "ended with 9" in died and "took too long" in hung


@pytest.mark.parametrize("factor", [2.0, math.nan])
def test_wrong_numbers_are_noticed(tmp_path: Path, factor: float) -> None:
    run.prepare(tmp_path)
    directory = tmp_path / "healthy" / "linear"
    adapter = run.fl.load(directory, "damaged")
    module = adapter.modules[0]
    adapter.updates[module].A.stored.mul_(factor)  # type: ignore[union-attr]
    with pytest.raises(run.Violation, match="off by"):
        run.compare(cases.healthy("linear", 12345), adapter, directory)


@pytest.mark.parametrize("pattern", damaged_config.FAST_PATTERNS)
def test_patterns_match_as_regular_expressions_do(pattern: str) -> None:
    expression, found = re.compile(rf"(.*\.)?({pattern})$"), Patterns({pattern: 3}, "here")
    for module in (cases.Q, cases.V, "conv", "q_proj", "a.b", "", "x.y.x"):
        assert (found.value(module) == 3) == (expression.match(module) is not None), module


@pytest.mark.parametrize("pattern", damaged_config.SLOW_PATTERNS)
def test_slow_patterns_are_answered_at_once(pattern: str) -> None:
    try:
        assert Patterns({pattern: 3}, "here").value("a." * 200 + cases.Q) is None
    except InputError as error:
        assert "cannot be matched in bounded time" in str(error)


def test_messages_are_printable() -> None:
    assert str(FastloraError("a\x1b[2J\nb\ud800 é")) == "a\\x1b[2J\\nb\\ud800 é"


def test_the_committed_result_is_clean() -> None:
    result = json.loads((HERE / "result.json").read_text())
    assert result["mutations"] >= 100_000 and result["violations"] == []
