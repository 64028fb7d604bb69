"""Small files and folders of an output, of which a decomposition of many pairs has tens of thousands: by the system's
own calls, since Python's streams and paths ask for more than is needed here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlora.files.disk_errors import output_error, writing

FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
NEW, ANEW = (os.O_WRONLY | os.O_CREAT | how for how in (os.O_EXCL, os.O_TRUNC))


@contextmanager
def open_file(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """The descriptor of a file: of one that is there, or that is made with :data:`NEW` or :data:`ANEW`. Raises
    :class:`OutputError`, also for what goes wrong inside the block."""
    with writing(path):
        file = os.open(path, FLAGS | flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Writes bytes to an open file; raises :class:`OSError`."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def write_text(directory: Path, name: str, text: str) -> None:
    """Writes a file of UTF-8; raises :class:`OutputError`."""
    path = f"{directory}{os.sep}{name}"
    try:
        file = os.open(path, FLAGS | ANEW, 0o666)
        try:
            write_all(file, text.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise output_error(error, Path(path)) from error


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, unless it is there; raises :class:`OSError`."""
    try:
        os.mkdir(path)
    except FileNotFoundError:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
