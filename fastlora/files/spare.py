"""A file that was made before it is needed, for who writes one file after another and is waited for.

Most of the time that a new file takes, in memory or in the system's copy of a disk, goes into finding and clearing its
pages. A spare has them: it is mapped whole, and written to as memory is.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from fastlora.runtime.system import file_system

PIECE = 4 * 2**20  # bytes that are cleared before it is looked whether to go on

WITH_ROOM = "tmpfs", "ext4"
"""Kinds of file systems where reserved room is there whenever it is written to. Where it is not, as on those that never
write to the same place twice, a process would end that writes to a mapped file."""

_offered: ContextVar[Spare | None] = ContextVar("fastlora_spare_file", default=None)


class Spare:
    """A file without a name in ``folder``, which the system drops when nobody has it open.

    ``make(size)`` makes it, ``take(path, size)`` gives it a name. On file systems that are none of :data:`WITH_ROOM`,
    or where the system cannot do this, nothing is made and nothing can be taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = -1
        self._memory: mmap.mmap | None = None
        self._taken: list[mmap.mmap] = []

    def make(self, size: int, go_on: Callable[[], bool] = lambda: True) -> None:
        """Makes a spare of ``size`` bytes, unless there is one of up to twice as many; where ``go_on()`` is false it
        stops and keeps none.

        Raises :class:`OSError`, with none kept.
        """
        self._taken.clear()
        if self._memory is not None and size <= len(self._memory) <= 2 * size:
            return
        self.drop()
        if not hasattr(os, "O_TMPFILE") or file_system(self.folder) not in WITH_ROOM:
            return
        try:
            self._file = os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
            os.truncate(self._file, size)
            memory = mmap.mmap(self._file, size)
            for first in range(0, size, PIECE):
                if not go_on():
                    self.drop()
                    return
                # Reserved first: memory that is mapped and not there would end the process when it is touched.
                os.posix_fallocate(self._file, first, min(PIECE, size - first))
                _touch(memory, first, min(first + PIECE, size))
            self._memory = memory
        except BaseException:
            self.drop()
            raise

    def take(self, path: Path, size: int) -> int | None:
        """Gives the spare the name ``path`` and the length ``size``, and returns the address where it is mapped;
        ``None`` where there is none that is long enough.

        The memory stays mapped until the next :meth:`make` or :meth:`drop`.
        """
        memory = self._memory
        if memory is None or len(memory) < size:
            return None
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # A folder's descriptor makes Python ask for linkat(2), which follows the link in /proc.
                os.link(f"/proc/self/fd/{self._file}", path.name, dst_dir_fd=folder, follow_symlinks=True)
            finally:
                os.close(folder)
            os.truncate(self._file, size)
            os.close(self._file)
            self._file, self._memory = -1, None
            self._taken.append(memory)
            return _address(memory)
        return None

    def drop(self) -> None:
        """Gives the memory back."""
        self._taken.clear()
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextlib.contextmanager
def offered(spare: Spare) -> Iterator[None]:
    """``with offered(spare):`` — the next file of tensors that is made takes the spare where it can."""
    token = _offered.set(spare)
    try:
        yield
    finally:
        _offered.reset(token)


def current() -> Spare | None:
    """The spare that is offered here."""
    return _offered.get()


def _touch(memory: mmap.mmap, first: int, last: int) -> None:
    ctypes.memset(_address(memory) + first, 0, last - first)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
