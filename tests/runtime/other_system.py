"""What ``test_other_systems.py`` runs: adapters are read, combined and written by a process that has only what every
system has. ``python other_system.py POOL OUT``; prints what it took away that was there."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

# Libraries first: they have forms of their own for other systems.
import numpy  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import typer.testing  # noqa: F401

CALLS = (
    "pread", "preadv", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise", "copy_file_range", "sendfile", "fork",
    "forkpty", "register_at_fork", "setpgid", "killpg", "fchmod", "fchown", "fdatasync", "statvfs", "fstatvfs", "major",
    "minor", "uname", "sysconf", "getuid", "geteuid", "getpgid", "sched_getaffinity", "sched_setaffinity",
    "sched_yield", "memfd_create", "mkfifo", "waitid", "WNOHANG", "O_TMPFILE", "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY",
    "O_NOFOLLOW", "O_SYNC", "O_NONBLOCK", "O_PATH",
)  # fmt: skip
MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "fastlora._core")


class Msvcrt(ModuleType):
    """Windows' locks, as far as one process can tell: a place in a file has one holder."""

    LK_NBLCK = 2
    held: ClassVar[set[tuple[int, int]]] = set()

    def locking(self, file: int, mode: int, count: int) -> None:
        place = os.fstat(file).st_ino, os.lseek(file, 0, os.SEEK_CUR)
        if place in self.held:
            raise PermissionError(13, "Permission denied")
        self.held.add(place)


def refuse_proc(call: Any) -> Any:
    """The call, of whom there is no /proc."""

    def refusing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, int) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return call(path, *args, **kwargs)

    return refusing


def take_away() -> list[str]:
    """Takes away what other systems lack, and returns what of it was there."""
    gone = [name for name in CALLS if hasattr(os, name)]
    for name in gone:
        delattr(os, name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.modules["msvcrt"] = Msvcrt("msvcrt")
    mmap: Any = importlib.import_module("mmap")
    for name in [n for n in vars(mmap) if n.startswith("MADV_")]:
        delattr(mmap, name)
    for place, name in ((os, "open"), (os, "stat"), (io, "open")):
        setattr(place, name, refuse_proc(getattr(place, name)))
    ctypes: Any = importlib.import_module("ctypes")
    ctypes.CDLL = lambda *_, **__: None  # a library without functions
    return gone


def main(pool: Path, out: Path) -> None:
    gone = take_away()
    import fastlora as fl
    from fastlora.backends import cpu
    from fastlora.cli.app import main as command
    from fastlora.files.unfinished import ResumableOutput
    from fastlora.runtime import system

    assert cpu.unavailable()  # plain torch computes
    a, b = (str(path) for path in sorted(pool.iterdir()))
    (0.5 * fl.load(a) + fl.load(b)).save(out / "sum")
    fl.decompose(fl.Pool([fl.load(a), fl.load(b)])).save(out / "parts")
    sys.argv = ["fastlora", "merge", a, b, "--method", "ties", "--energy", "0.99", "--out", str(out / "merged")]
    try:
        command()
    except SystemExit as end:
        assert not end.code
    (out / "merged" / "report.json").unlink(missing_ok=True)
    with ResumableOutput(out / "long") as folder:
        with open(folder / "lock", "rb") as held:
            assert not system.lock(held.fileno())
        (folder / "x").write_text("whole")
    print(*gone)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
