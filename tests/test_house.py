"""Rules of the house about the source files themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
MOST_LINES = 400


def tracked_sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"the files of the project are known only in a git checkout: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]  # git still lists a file that was deleted but not yet committed


def too_long(paths: Iterable[Path], root: Path) -> dict[str, int]:
    """How many lines the files have that have too many."""
    lengths = {str(path.relative_to(root)): len(path.read_bytes().splitlines()) for path in paths}
    return {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_no_source_file_is_too_long() -> None:
    paths = tracked_sources()
    assert Path(__file__).resolve() in paths and {f"*{path.suffix}" for path in paths} == set(SOURCES)
    offenders = too_long(paths, ROOT)
    assert not offenders, f"more than {MOST_LINES} lines, split by idea: {offenders}"


def test_long_files_are_found(tmp_path: Path) -> None:
    """The rule of this file can fail."""
    lengths = {"empty.h": 0, "most.py": MOST_LINES, "long.py": MOST_LINES + 1, "longer.cu": 2 * MOST_LINES}
    for name, length in lengths.items():
        (tmp_path / name).write_text("\n" * length)
    (tmp_path / "unfinished.cpp").write_text("\n" * MOST_LINES + "// a last line without an end")
    found = too_long(sorted(tmp_path.iterdir()), tmp_path)
    assert found == {"long.py": 401, "longer.cu": 800, "unfinished.cpp": 401}
