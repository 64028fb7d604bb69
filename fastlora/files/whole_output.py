"""Folders of a few small files that are made in one go, by as few calls of the system as there are: of a pool of
hundreds of small adapters, asking takes longer than writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

from fastlora.files.small_files import FLAGS, NEW, write_all

Pieces = Sequence[bytes | bytearray | memoryview]
"""What a file holds, piece after piece."""


def placed(path: str, files: Mapping[str, Pieces]) -> bool:
    """Makes the folder ``path`` of new files, as :class:`fastlora.files.output.OutputDirectory` does: it is whole or
    not there. ``False``, with nothing left, where anything stands in the way: that class knows what it means."""
    name = os.path.basename(path)
    if name in _NO_NAMES or path[0] == "~" or os.access(path, os.F_OK):
        return False
    # Links on the way lead to the same place in every call, and a folder that is not there stands in the way.
    staging = f"{path[: -len(name)]}.{name}.partial-{os.getpid()}"
    try:
        try:
            os.mkdir(staging)
        except FileExistsError:  # another thread makes the same
            return False
        for file, pieces in files.items():
            _write(f"{staging}{os.sep}{file}", pieces)
        os.rename(staging, path)  # fails where something has come to be there, unless that is an empty folder
        return True
    except (OSError, ValueError):
        pass
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return False


_NO_NAMES = ("", ".", "..")


def _write(path: str, pieces: Pieces) -> None:
    file = os.open(path, _NEW, 0o666)
    try:
        count = _together(file, pieces) if len(pieces) > 1 else os.write(file, pieces[0])
        if count < sum(map(len, pieces)):
            write_all(file, b"".join(pieces)[count:])
    finally:
        os.close(file)


_NEW = FLAGS | NEW


def _together(file: int, pieces: Pieces) -> int:
    return os.writev(file, pieces) if hasattr(os, "writev") else 0
