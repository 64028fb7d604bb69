"""Small files and folders of an output, of which a decomposition of many pairs has tens of thousands: by the system's
own calls, since Python's streams and paths ask for more than is needed here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlora.files.disk_errors import writing

FLAGS = os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def new_file(path: Path, flags: int = os.O_EXCL) -> Iterator[int]:
    """The descriptor of a file that is made, or with ``O_TRUNC`` made anew; raises :class:`OutputError`, also for what
    goes wrong inside the block."""
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


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8; raises :class:`OutputError`."""
    with new_file(path, os.O_TRUNC) as file:
        write_all(file, text.encode())


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, unless it is there; raises :class:`OSError`."""
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)
