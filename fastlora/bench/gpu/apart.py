"""Work in processes of their own, forked after the imports: an error of a device that spoils a process, or a kernel
that never ends, costs that work alone, and torch is imported once."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process is sent when its parent ends


@dataclass(frozen=True, slots=True)
class Ended:
    """How some work ended: ``reason`` is ``None`` where it returned."""

    name: str
    seconds: float
    reason: str | None = None


@dataclass(slots=True)
class _Child:
    name: str
    process: int
    limit: float
    start: float = field(default_factory=time.monotonic)


def preload() -> None:
    """Does once, before a process is forked, what each would do: the import of Triton, and the hash of its own files by
    which it finds compiled kernels, half a second each. Touches no device."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("triton.runtime.cache").triton_key()


def run(
    works: Iterable[tuple[str, Callable[[], None]]], *, limit: float, together: int = 1, whole: float = float("inf")
) -> Iterator[Ended]:
    """Runs each work in a process of its own, ``together`` at a time, and tells how they ended as they do.

    Works are begun in their order. One that takes more than ``limit`` seconds is killed, as are all when ``whole``
    seconds have passed since the first; those that had not begun by then are told too. No device may have been used
    by this process before: what is forked could not use it.
    """
    ends = time.monotonic() + whole
    waiting, running = list(works), list[_Child]()
    while waiting or running:
        while waiting and len(running) < together and time.monotonic() < ends:
            name, work = waiting.pop(0)
            running.append(_Child(name, _fork(work), limit))
        if waiting and not running:
            for name, _ in waiting:
                yield Ended(name, 0.0, "not begun: the time was up")
            return
        time.sleep(0.01)
        for child in list(running):
            ended = _ended(child, ends)
            if ended is not None:
                running.remove(child)
                yield ended


def _fork(work: Callable[[], None]) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        _end_with(parent)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # nothing of the parent's is cleaned up twice


def _end_with(parent: int) -> None:
    """Kills this process when its parent ends, however that does: a kernel that never ends would keep the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _ended(child: _Child, ends: float) -> Ended | None:
    seconds = time.monotonic() - child.start
    done, status = os.waitpid(child.process, os.WNOHANG)
    if done:
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return Ended(child.name, seconds, f"ended by {signal.Signals(-code).name}")
        return Ended(child.name, seconds, f"ended with {code}" if code else None)
    if seconds < child.limit and time.monotonic() < ends:
        return None
    try:
        os.killpg(child.process, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child.process, signal.SIGKILL)
    os.waitpid(child.process, 0)
    return Ended(child.name, seconds, f"stopped after {seconds:.0f} s")
