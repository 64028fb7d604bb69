"""Composed adapters on disk: named by content, bounded in size, shared by processes.

A server reads an adapter again whenever it has put it out of its own memory, and remembers its path as long as it
runs. So what a living process has given out is never deleted. Each process keeps a *lease*: a file that lists the keys
it gave out, and that it holds locked. The lock ends with the process, however that ends. Keys, leases and deletions
change under one lock of the whole cache, which is held for moments: results are computed outside it, and renamed into
place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from fastlora.core.names import CONFIG_NAME
from fastlora.errors import OutputError
from fastlora.runtime.system import lock

LOCK, LEASES, UNFINISHED = ".lock", ".leases", ".unfinished"
WEIGHTS = "adapter_model.safetensors"
PATIENCE = 30.0
"""Seconds to wait for the cache's lock: nobody holds it for long, unless a process is stopped."""
ABANDONED = 86_400.0
"""Seconds after which what is unfinished belongs to nobody."""


class Cache:
    """Directories under keys, of ``most_bytes`` together."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path, self.most_bytes = path, most_bytes
        self._lease: IO[str] | None = None
        self._given: set[str] = set()
        self._owner = 0

    def find(self, key: str) -> Path | None:
        """The directory of a key, which stays as long as this process runs; ``None`` where there is none."""
        if not (self.path / key).is_dir():
            return None
        with self._locked():
            return self._given_out(key)

    def require_room(self) -> None:
        """Raises :class:`OutputError` where everything that there is room for is in use."""
        if not self.path.is_dir():
            return
        with self._locked():
            in_use = self._in_use()
            if sum(_size(self.path / key) for key in in_use) >= self.most_bytes:
                raise self._full(len(in_use))

    def staging(self, key: str) -> Path:
        """Where the result for a key can be written before :meth:`put`; nothing is there yet."""
        folder = self.path / UNFINISHED
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}-{uuid.uuid4().hex}"

    def put(self, key: str, staged: Path) -> Path:
        """Gives a result its place, and deletes what was not used for longest where room is needed.

        Raises :class:`OutputError` where all of the room is in use. What was staged is gone in any case.
        """
        doomed = [staged]
        try:
            with self._locked():
                earlier = self._given_out(key)
                if earlier is not None:  # another process was first
                    return earlier
                doomed += self._make_room(_size(staged))
                self._take_lease(key)
                os.rename(staged, self.path / key)
                return self.path / key
        finally:
            for path in doomed:
                shutil.rmtree(path, ignore_errors=True)

    def _given_out(self, key: str) -> Path | None:
        path = self.path / key
        if not path.is_dir():
            return None
        if not _is_whole(path):  # left by a machine that went down, or damaged
            shutil.rmtree(self._set_aside(path), ignore_errors=True)
            return None
        self._take_lease(key)
        os.utime(path)
        return path

    def _make_room(self, size: int) -> list[Path]:
        """Sets aside what must go for ``size`` bytes; what is returned is to be deleted."""
        in_use = self._in_use()
        entries = {p.name: (p.stat().st_mtime_ns, _size(p)) for p in self.path.iterdir() if not p.name[0] == "."}
        free = self.most_bytes - sum(s for _, s in entries.values())
        idle = sorted((k for k in entries if k not in in_use), key=entries.__getitem__)
        going = []
        for key in idle:
            if free >= size:
                break
            free += entries[key][1]
            going.append(key)
        if free < size:
            raise self._full(len(in_use))
        return [*(self._set_aside(self.path / key) for key in going), *self._abandoned()]

    def _set_aside(self, path: Path) -> Path:
        target = self.staging(path.name)
        os.rename(path, target)
        return target

    def _abandoned(self) -> list[Path]:
        folder = self.path / UNFINISHED
        before = time.time() - ABANDONED
        return [p for p in folder.iterdir() if p.stat().st_mtime < before] if folder.is_dir() else []

    def _full(self, count: int) -> OutputError:
        return OutputError(
            f"the cache {self.path} is full: {count} results are in use by servers, and {self.most_bytes} bytes are "
            "the bound; raise it (CACHE_SIZE), or restart the servers"
        )

    def _take_lease(self, key: str) -> None:
        if self._owner != os.getpid():  # a fork has a copy of its parent's
            self._given, self._owner, self._lease = set(), os.getpid(), None
        if self._lease is not None and not os.path.exists(self._lease.name):  # somebody deleted the cache
            self._lease = None
        if self._lease is None:
            self._lease = self._new_lease()
        elif key in self._given:
            return
        self._lease.write(f"{key}\n")
        self._lease.flush()
        self._given.add(key)

    def _new_lease(self) -> IO[str]:
        """A lease of this process for what it has given out so far."""
        folder = self.path / LEASES
        folder.mkdir(exist_ok=True)
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        lease = (folder / name).open("a", encoding="ascii")
        lock(lease.fileno())
        lease.writelines(f"{key}\n" for key in sorted(self._given))
        return lease

    def _in_use(self) -> set[str]:
        """The keys that living processes have given out. Leases of those that ended are removed."""
        keys = set(self._given) if self._owner == os.getpid() else set()
        folder = self.path / LEASES
        for file in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError), file.open("r+", encoding="ascii") as lease:
                if lock(lease.fileno()):
                    file.unlink()
                else:
                    keys.update(lease.read().split())
        return keys

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a") as guard:  # opened anew, so that it holds against other threads too
            deadline = time.monotonic() + PATIENCE
            while not lock(guard.fileno()):
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"{self.path / LOCK} is held by another process for more than {PATIENCE:g} seconds; end the "
                        "process that hangs"
                    )
                time.sleep(0.001)
            yield


def _size(path: Path) -> int:
    """Bytes of the files in a directory."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0


def _is_whole(path: Path) -> bool:
    """Whether a server could load it: a configuration, and weights that are as long as their header says."""
    try:
        if not (path / CONFIG_NAME).stat().st_size:
            return False
        with safe_open(path / WEIGHTS, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
