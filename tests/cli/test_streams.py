"""Standard streams that are closed, full or left by their reader: the exit code tells, and results are whole."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from command import ADAPTERS, COMMAND, HANGS, environment

import fastlora as fl

SPAM, MOVIE = ADAPTERS / "spam", ADAPTERS / "movie_a"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which ``$F`` is the command."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=environment({"F": " ".join(COMMAND), "A": str(SPAM), "B": str(MOVIE)}),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_results_are_whole_whatever_becomes_of_the_streams(closed: str, tmp_path: Path) -> None:
    ended = 'echo "${PIPESTATUS[0]}" > code'
    found = shell(f"$F decompose $A $B -o out {closed}; {ended}", tmp_path)
    assert (tmp_path / "code").read_text() == "0\n" and "Traceback" not in found.stderr
    assert fl.load(tmp_path / "out" / "unique" / "spam").modules == fl.load(SPAM).modules
    assert sorted(os.listdir(tmp_path)) == ["code", "out"]


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_a_refusal_has_its_code_where_nobody_can_read_it(closed: str, tmp_path: Path) -> None:
    found = shell(f"$F merge $A nowhere -o out {closed}", tmp_path)
    assert found.returncode == 2 and found.stdout == "" and "Traceback" not in found.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "closed"), [("inspect $A --all", ">&-"), ("methods", "| head -1"), ("overlap $A $B", "| true")]
)
def test_what_is_only_printed(command: str, closed: str, tmp_path: Path) -> None:
    found = shell(f"$F {command} {closed}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert found.returncode == 0 and found.stderr == ""


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    for closed in (">/dev/full", "1</dev/null"):
        found = shell(f"$F inspect $A {closed}", tmp_path)
        assert found.returncode == 2 and "the result could not be printed" in found.stderr
