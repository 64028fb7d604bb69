"""Runs the command as a user does, and looks at what it printed and left behind.

It runs in this process, from its entry point on: a process of its own takes two seconds for its imports. Where the
process is the point, as with limits, signals or what is read when Python starts, there is :func:`run_process`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fastlora.cli import app, exits

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "examples" / "adapters"
DATA = ROOT / "tests" / "data"
SCRIPT = Path(sys.executable).parent / "fastlora"
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "fastlora"]
SETTINGS = ("FASTLORA_BACKEND", "PYTHONIOENCODING", "FORCE_COLOR", "COLUMNS")
READ_LATER = {"FASTLORA_BACKEND", "COLUMNS"}  # settings that are read when they are used, and not once in a process
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANGS = 600  # seconds that no run takes, on no machine


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
    """This environment without settings that a developer may have, with changes. An instruction set stays: it holds for
    this process too."""
    return {k: v for k, v in os.environ.items() if k not in SETTINGS} | (changes or {})


def run(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> Run:
    """One run; in a process of its own where ``before`` is to be called in it, or ``env`` has what is read once."""
    if before is not None or not set(env or {}) <= READ_LATER:
        return run_process(*arguments, cwd=cwd, env=env, before=before)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    with _as_process(list(map(str, arguments)), cwd, environment(env), *streams):
        code = _exit_code()
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return Run(code, out, err)


@contextlib.contextmanager
def _as_process(
    arguments: list[str], cwd: Path, env: dict[str, str], out: io.TextIOWrapper, err: io.TextIOWrapper
) -> Iterator[None]:
    """What a process has of its own is that of the command inside the block, and as it was after it."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        patch.setattr(sys, "argv", ["fastlora", *arguments])
        patch.setattr(sys.modules["__main__"], "__package__", None)  # else the help would name pytest
        patch.setattr(sys, "stdin", io.StringIO())
        for name in os.environ.keys() - env.keys():
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        # Python's own defaults, which a user sees on standard error; pytest keeps warnings for itself.
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        patch.setattr(warnings, "showwarning", _show_warning)
        try:
            yield
        finally:
            exits.outputs.clear()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _exit_code() -> int:
    """What the process would end with: an error that nothing handles is printed, and ends it with 1."""
    try:
        app.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_process(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> Run:
    """One run in a process of its own; ``before`` is called in it before it becomes the command."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
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
