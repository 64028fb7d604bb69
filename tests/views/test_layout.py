"""Tables fit the width that there is: no line is longer, no word is broken; nothing of a file is printed raw."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from rich.cells import cell_len

from fastlora.views import benchmarks, results
from fastlora.views.tables import Table
from fastlora.views.text import escaped, shorten, shorten_apart, wrapped

WIDTHS = [80, 100, 140]


def words_of(text: str) -> set[str]:
    return set(re.split(r"[\s─]+", text))


def check_fits(text: str, width: int, vocabulary: set[str]) -> None:
    """No line is wider, and every word is one of the vocabulary, whole, or a number."""
    assert max(map(cell_len, text.splitlines())) <= width
    strange = {w for w in words_of(text) - vocabulary if w and not re.fullmatch(r"[-\d.,:/÷×–]+", w)}
    assert not strange


def bench_data() -> dict[str, Any]:
    rows = [
        ("eigh, 4096 matrices of 64×64, float64, clustered", "torch.linalg.eigh, 2 threads", 1.234, None, ""),
        ("decompose in memory, llama2-7b-8x16-fp32", "plain torch, 2 threads", 123.4, 0.31, "timed once"),
        ("one 1024×1024 module, dense algorithm", "numpy float64, 1 thread", 0.00123, 1e-4, ""),
    ]
    return {
        "machine": "A processor, 2 cores; OMP_WAIT_POLICY passive",
        "copy_bytes_per_second": {1: 1e10, 2: 2e10},
        "fp32_operations_per_second": {1: 1e11, 2: 2e11},
        "fp64_operations_per_second": {1: 5e10, 2: 1e11},
        "rows": [
            {
                "what": w,
                "opponent": o,
                "theirs": t,
                "ours": {1: t / 300, 2: t / 500},
                "floor": f and {1: 2 * f, 2: f},
                "note": n,
            }
            for w, o, t, f, n in rows
        ],
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_bench_fits(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    data = bench_data()
    benchmarks.show_bench(data)
    text = capsys.readouterr().out
    cells = [cell for row in data["rows"] for cell in benchmarks.cells(row)]
    vocabulary = words_of(" ".join([*benchmarks.HEADER, *cells, benchmarks.machine_line(data), "timed once"]))
    check_fits(text, width, vocabulary)
    for cell in cells:
        assert set(cell.split()) <= words_of(text)


def overlap_data(names: list[str]) -> dict[str, Any]:
    """Cosines that fall with the distance of two adapters in the list; the last one has nothing in common."""
    k = len(names)
    cosine = [[1.0 - abs(i - j) / k for j in range(k)] for i in range(k)]
    subspace = [[0.5 if i == j else 0.25 for j in range(k)] for i in range(k)]
    for i in range(k - 1):
        cosine[i][-1] = cosine[-1][i] = math.nan
    return {"names": names, "cosine": cosine, "subspace": subspace, "modules": {}}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [2, 8, 9, 40])
def test_overlap_fits(
    width: int, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"run{i}-step" for i in range(count)]
    results.show_overlap(overlap_data(names), True, None)
    text = capsys.readouterr().out
    prose = "The nearest 3 of each of adapters, by the cosine of ΔW: cosine of ΔW subspace overlap adapter nearest"
    check_fits(text, width, {*names, *prose.split(), *"full matrices: --csv FILE or --json".split()})
    assert words_of(text) >= set(names)


def test_many_adapters_are_told_by_their_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a{i}" for i in range(30)]
    data = overlap_data(names)
    found = dict(results.nearest(data))
    assert [other for other, _, _ in found["a0"]] == ["a1", "a2", "a3"] and found["a29"] == []
    assert found["a5"][0][1:] == (pytest.approx(1 - 1 / 30), 0.25)
    results.show_overlap(data, False, None)
    text = capsys.readouterr().out
    assert "10 more adapters: --all" in text and "full matrices: --csv FILE or --json" in text
    results.show_overlap(data, True, None)
    assert words_of(capsys.readouterr().out) >= set(names)


def test_a_few_adapters_have_a_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    results.show_overlap(overlap_data(["a", "b", "c"]), False, None)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("a ")]
    assert rows == [["a", "1.000", "0.667", "–"], ["a", "0.500", "0.250", "0.250"]]


@pytest.mark.parametrize("width", [*WIDTHS, 40])
def test_columns_without_room_continue_in_another_table(width: int) -> None:
    table = Table("name:module", *(f"number:column{i}" for i in range(12)))
    table.add("layers.0.attention.query", *(1000000 + i for i in range(12)))
    lines = table.lines(width)
    assert max(map(cell_len, lines)) <= width
    assert [int(w) for line in lines for w in line.split() if w.isdigit()] == [1000000 + i for i in range(12)]
    headings = [w for line in lines for w in line.split() if w.startswith("column")]
    assert headings == [f"column{i}" for i in range(12)]


def test_names_are_shortened_in_the_middle_and_stay_apart() -> None:
    assert shorten("a-very-long-name-of-an-adapter", 11) == "a-ver…apter"
    assert shorten("short", 11) == "short"
    names = [f"start-{c}-the-same-end" for c in "abc"]
    short = shorten_apart(names, 10)
    assert len(set(short)) == 3 and max(map(len, short)) == 10
    assert shorten_apart([names[0], names[0]], 10) == [short[0], short[0]]
    assert cell_len(shorten("漢字" * 20, 9)) <= 9
    table = Table("name:adapter", "number:rank")
    for name in (f"{'x' * 60}{i}{'y' * 60}" for i in range(3)):
        table.add(name, 8)
    lines = table.lines(80)
    assert max(map(cell_len, lines)) <= 80 and len(set(lines)) == len(lines) == 5


def test_lines_are_broken_between_words() -> None:
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("a /path/that/is/long b", 6) == ["a", "/path/that/is/long", "b"]


def test_control_characters_are_shown_as_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    assert escaped("a\x1b[31m\n\u202eb\ud800 é漢") == r"a\x1b[31m\n\u202eb\ud800 é漢"
    table = Table("name:adapter\x07", "text:\x1b[2J")
    table.add("a\x1b]0;title\x07", "b\nc")
    table.print()
    printed = capsys.readouterr().out
    assert r"a\x1b]0;title\x07" in printed and r"b\nc" in printed
    assert all(c.isprintable() for c in printed.replace("\n", ""))
