"""Decompositions of very many pairs, in print: what stands out, and a warning of each kind."""

from __future__ import annotations

from typing import Any

import pytest

from fastlora.views.results import show_decomposition
from fastlora.views.tables import ROWS


def report(i: int, largest: float, shared: int = 0) -> dict[str, Any]:
    row = {"shared": shared, "eigenvalues": [largest, 0.1], "chance_edge": 0.2}
    return {
        "title": f"a{i:02d} + b",
        "settings": {"adapters": [f"a{i}", "b"]},
        "rows": [row],
        "totals": {"shared_directions": shared, "expected_by_chance": 0.0},
        "warnings": [
            f"Nothing is shared at τ = 0.85: the largest eigenvalues are {largest}.",
            f"The unique part of 'a{i}' lost.",
        ],
    }


def printed(capsys: pytest.CaptureFixture[str], count: int, every: bool = False) -> str:
    reports = [report(i, round(0.3 + i / 100, 2), shared=int(i == 3)) for i in range(count)]
    show_decomposition({"mode": "pairs", "out": "out", "reports": reports}, every)
    return " ".join(capsys.readouterr().out.split())


def test_those_that_stand_out_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, 100)
    shown = [i for i in range(100) if f"a{i:02d} + b" in text]
    assert shown == [3, *range(81, 100)] and text.index("a03 + b") < text.index("a99 + b") < text.index("a98 + b")
    assert "80 more: --all, --csv FILE, --html FILE or report.json" in text


def test_warnings_of_one_kind_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, 100)
    assert text.count("warning:") == 2
    assert f"are 0.33. ({ROWS - 1} more of this kind: --all)" in text and f"lost. ({ROWS - 1} more" in text


def test_all_are_printed_on_request_and_few_always(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, 100, every=True)
    assert text.index("a00 + b") < text.index("a99 + b") and text.count("warning:") == 200 and "more" not in text
    text = printed(capsys, ROWS)
    assert all(f"a{i:02d} + b" in text for i in range(ROWS)) and "--csv" not in text
