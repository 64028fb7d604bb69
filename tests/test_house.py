"""Rules of the house that imports do not show."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

import fastlora as fl

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


def test_test_files_have_names_of_their_own() -> None:
    """Two of one name in different folders cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice


def test_long_files_are_found(tmp_path: Path) -> None:
    """The rule of this file can fail."""
    lengths = {"empty.h": 0, "most.py": MOST_LINES, "long.py": MOST_LINES + 1, "longer.cu": 2 * MOST_LINES}
    for name, length in lengths.items():
        (tmp_path / name).write_text("\n" * length)
    (tmp_path / "unfinished.cpp").write_text("\n" * MOST_LINES + "// a last line without an end")
    found = too_long(sorted(tmp_path.iterdir()), tmp_path)
    assert found == {"long.py": 401, "longer.cu": 800, "unfinished.cpp": 401}


def test_no_room_hides_a_public_function() -> None:
    """A room that is imported becomes an attribute of the package, in place of a function of its name."""
    rooms = {module.name for module in pkgutil.iter_modules(fl.__path__)}
    assert "merging" in rooms
    assert not rooms & {name for name in fl.__all__ if inspect.isroutine(getattr(fl, name))}


def private_imports(source: str) -> list[str]:
    """The private names that a file takes from others of the package; the compiled module is none."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = [a.name for node in imports if (node.module or "").startswith("fastlora") for a in node.names]
    return [name for name in names if name.startswith("_") and name not in ("_core", "__version__")]


def test_nobody_imports_what_is_private_elsewhere() -> None:
    assert private_imports("from fastlora.core.sums import _add, common_base\nfrom fastlora import _core") == ["_add"]
    taken = {path: private_imports(path.read_text(encoding="utf-8")) for path in (ROOT / "fastlora").rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): names for path, names in taken.items() if names}


def test_nobody_changes_a_finished_record() -> None:
    """Records are frozen: an assignment fails at once."""
    adapter = fl.Adapter("a", {})
    with pytest.raises(AttributeError):
        adapter.name = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        fl.TaskVector("a", {}).deltas = {}  # type: ignore[misc]
