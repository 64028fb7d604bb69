"""What systems do in different ways: memory in use, advice on mapped pages, reads and writes at a place in a file,
locks, and whether a process runs.

Linux has all of it. Where a call is missing, as on Windows and in part on macOS, a portable form takes its place:
positions in files by seeking under a lock, room in files by their length, locks by ``msvcrt``. Advice that cannot be
given is left out, and memory that cannot be told counts as 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
DONT_NEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
# Python knows the advice only where the headers that it was built with do.
HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", 14) if sys.platform == "linux" else None
NO_ROOM_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system cannot, the disk is not full
NO_COPY_CALL = (*NO_ROOM_CALL, errno.EXDEV, errno.EBADF, errno.ETXTBSY)  # between such files, or at all
COPY_BYTES = 4 * 2**20
LARGEST_DESCRIPTOR = 2**31 - 1
PAGES_AT_ONCE = 2**16
NO_COPY = bytes(kind for kind in range(256) if not kind & 0xC0 or kind & 0x20)
"""The highest byte of what Linux says of a page that is not in memory (or swapped), or is a file's own."""

_seeking = threading.Lock()


def resident() -> int:
    """Resident bytes of this process now; its peak where the system tells only that, 0 where it tells nothing."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * PAGE
    usage = _module("resource")
    if usage is None:
        return 0
    peak: int = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def advise(address: int, size: int, advice: int | None) -> None:
    """Tells the system how the whole pages of some memory will be used; only advice, so failing changes nothing."""
    first = -(-address // PAGE) * PAGE
    last = (address + size) // PAGE * PAGE
    call = _of_library("madvise")
    if first < last and advice is not None and call is not None:
        call(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


@functools.cache
def _of_library(name: str) -> Any:
    """A function of the C library."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):  # no such call, or no library of this process to look in
        return None


def unwritten(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of private mappings of files, by their starts and ends, those whose pages in memory are the files' own: a page
    that was written into is a copy. None where the system does not tell."""
    try:
        table = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return []
    try:
        return [(start, end) for start, end in places if not _has_copies(table, start // PAGE, -(-end // PAGE))]
    except OSError:
        return []
    finally:
        os.close(table)


def _has_copies(table: int, first: int, end: int) -> bool:
    """Whether some of the pages, by number, are copies, in the system's table: eight bytes for each."""
    while first < end:
        raw = os.pread(table, 8 * min(end - first, PAGES_AT_ONCE), 8 * first)
        if len(raw) < 8 or raw[7::8].translate(None, NO_COPY):
            return True
        first += len(raw) // 8
    return False


def file_mappings(suffixes: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Sorted starts and ends of private mappings of files with such names; none where the system has no list."""
    starts: list[int] = []
    ends: list[int] = []
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith("p") and fields[5].endswith(suffixes):
            start, end = fields[0].split("-")
            starts.append(int(start, 16))
            ends.append(int(end, 16))
    return starts, ends


def open_to_read(path: Path | str) -> int:
    """A descriptor of the bytes of a file, which child processes do not get."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Writes bytes to a place in a file, and returns how many; raises :class:`OSError`. ``file``: a descriptor, or
    above :data:`LARGEST_DESCRIPTOR` the address where a file is mapped whole."""
    if file > LARGEST_DESCRIPTOR:
        ctypes.memmove(file + offset, bytes(data), len(data))
        return len(data)
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def write_all_at(file: int, data: memoryview, offset: int) -> None:
    """Writes all bytes to a place in a file; raises :class:`OSError`."""
    while len(data):
        count = write_at(file, data, offset)
        data, offset = data[count:], offset + count


def read_at(file: int, memory: memoryview, offset: int) -> int:
    """Fills the start of ``memory`` from a place in a file, and returns how many bytes came; raises
    :class:`OSError`."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [memory], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        found = os.read(file, min(len(memory), 2**24))
    memory[: len(found)] = found
    return len(found)


def copy_at(source: int, target: int, start: int, end: int, offset: int) -> int:
    """Copies the bytes ``[start, end)`` of a file to a place in another: by the system where it can, which moves them
    within its own memory. Returns how many were there; raises :class:`OSError`."""
    done, by_system = start, hasattr(os, "copy_file_range")
    while done < end:
        count = 0
        if by_system:
            try:
                count = os.copy_file_range(source, target, end - done, done, offset + done - start)
            except OSError as error:
                if error.errno not in NO_COPY_CALL:
                    raise
            by_system = count > 0  # of some files it says 0 wherever they end
        if not count:
            memory = memoryview(bytearray(min(end - done, COPY_BYTES)))
            count = read_at(source, memory, done)
            if not count:
                break
            write_all_at(target, memory[:count], offset + done - start)
        done += count
    return done - start


def boot() -> str:
    """What tells this start of this machine from all others; nothing where the system has no such name."""
    identity = Path("/proc/sys/kernel/random/boot_id")
    return identity.read_text().strip() if identity.exists() else ""


def make_room(file: int, size: int) -> None:
    """Gives a file its length: with the room on the disk where the system can, so that a full one is found out."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM_CALL:
            raise
        os.truncate(file, size)


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as the system names it (``"ext4"``); nothing where it does not
    tell."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return ""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = (line.split() for line in mounts.read_text().splitlines())
    return next((fields[fields.index("-") + 1] for fields in lines if fields[2] == number), "")


def lock(file: int) -> bool:
    """Locks an open file for its holder alone, until it is closed; ``False`` where another holds it."""
    posix = _module("fcntl")
    if posix is not None:
        try:
            posix.flock(file, posix.LOCK_EX | posix.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    windows = importlib.import_module("msvcrt")
    with _seeking:
        os.lseek(file, 2**30, os.SEEK_SET)  # a byte beyond the end: what is written there before stays readable
        try:
            windows.locking(file, windows.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    return True


def after_fork(call: Callable[[], None]) -> None:
    """Has every child process begin with a call; where processes are not copied, there is none that would need it."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number; ``True`` where that cannot be found out."""
    if os.name == "nt":  # a signal 0 would end it there
        return _is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _is_running_on_windows(pid: int) -> bool:
    kernel: Any = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if handle:
        kernel.CloseHandle(handle)
        return True
    return bool(ctypes.get_last_error() != 87)  # type: ignore[attr-defined]  # ERROR_INVALID_PARAMETER: there is none


def _module(name: str) -> Any:
    """A module of Python's that only some systems have, or ``None``."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None
