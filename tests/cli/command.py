"""Runs the installed command as a user does, and looks at what it printed and left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "examples" / "adapters"
DATA = ROOT / "tests" / "data"
SCRIPT = Path(sys.executable).parent / "fastlora"
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "fastlora"]
SETTINGS = ("FASTLORA_BACKEND", "FASTLORA_ISA", "PYTHONIOENCODING", "FORCE_COLOR", "COLUMNS")


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be one JSON document without the extensions that Python adds."""
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """This environment without settings that a developer may have, with changes."""
    return {k: v for k, v in os.environ.items() if k not in SETTINGS} | (changes or {})


def run(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> Run:
    """One run; ``before`` is called in the child before it becomes the command."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=before,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def done(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Run:
    """A run that must succeed."""
    found = run(*arguments, cwd=cwd, env=env)
    assert found.code == 0, found.err
    return found


def refused(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> str:
    """The message of a run that must be refused: one line, exit code 2, nothing printed, nothing changed."""
    there = tree(cwd)
    found = run(*arguments, cwd=cwd, env=env, before=before)
    assert found.code == 2, found.err or found.out
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1 and found.err.endswith("\n"), found.err
    assert tree(cwd) == there
    return found.err.strip()


def tree(directory: Path) -> dict[str, str]:
    """Every file and folder below a directory, with what the files hold."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(directory.rglob("*"))
    }


def places(directory: Path) -> set[str]:
    """Where the adapters of an output lie."""
    return {str(p.parent.relative_to(directory)) for p in directory.rglob("adapter_model.safetensors")}


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """A file system in memory at ``directory``; skips where mounting is not permitted."""
    directory.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small or read-only file system with")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a file system for this test is not permitted: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)
