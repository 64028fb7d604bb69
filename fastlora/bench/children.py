"""Children that leave nothing behind: whatever ends this process while one runs ends also what that one started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE = 5.0
"""Seconds for a child to end by itself: a build passes the signal on to its compilers, which a kill would not."""

LAST_LINES = 5

Steps = Callable[[float], object]
"""Called with the share of its work that a child says it has done."""

_STEP = re.compile(r"\[ *(\d+)(?:/(\d+)|%)\]")


def run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    steps: Steps | None = None,
) -> subprocess.CompletedProcess[str]:
    """As :func:`subprocess.run` with what was printed, in a group of its own: Ctrl-C reaches this process alone."""
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert child.stdout is not None
        printed = []
        try:
            for line in child.stdout:
                printed.append(line)
                if steps is not None and (share := share_done(line)) is not None:
                    steps(share)
            child.wait()
        except BaseException:
            end(child)
            raise
        finally:
            child.stdout.close()
        errors.seek(0)
        told = errors.read().decode("utf-8", "replace")
    return subprocess.CompletedProcess(command, child.returncode, "".join(printed), told)


def end(child: subprocess.Popen[str]) -> None:
    """Asks a child and its group to end, and kills the group that has not."""
    if not hasattr(os, "killpg"):
        child.kill()
        child.wait()
        return
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)


def share_done(line: str) -> float | None:
    """What ninja's ``[3/26]`` and pytest's ``[ 45%]`` say; ``None`` for other lines."""
    found = _STEP.search(line)
    if found is None:
        return None
    done, total = int(found[1]), int(found[2] or 100)
    return min(done / total, 1.0) if total else None


def last_words(ended: subprocess.CompletedProcess[str]) -> str:
    """The end of what a process said."""
    lines = [line.strip() for line in (ended.stdout + "\n" + ended.stderr).splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:])[-600:] or f"exit code {ended.returncode}"
