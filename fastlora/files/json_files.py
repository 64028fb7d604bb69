"""What every file of an adapter must be before anything is read from it."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from fastlora.errors import InputError

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def require_file(path: Path, most: int | None = None) -> None:
    """Refuses what is no regular file (reading a pipe or a device may never end) and what is larger than ``most``."""
    try:
        status = path.stat()
    except OSError as error:
        refuse_dangling(path)
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(f"{path} is {what}, a file is needed; copy or download the adapter again")
    if most is not None and status.st_size > most:
        raise InputError(f"{path} has {status.st_size} bytes, more than {most}; it is no such file")


def refuse_dangling(path: Path) -> None:
    """Refuses a link whose target does not exist, as caches leave them whose files were deleted."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; copy or download what it stands for again"
        )


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which every key is there once: readers disagree about which of two counts.

    Raises :class:`InputError`; ``what`` says what was parsed.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise InputError(f"{what} names {twice[:300]!r} twice; remove one of the two")
        return fields

    try:
        values = json.loads(raw, object_pairs_hook=once)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{what} is no sound JSON (nested too deeply); save or download the adapter again") from None
    except ValueError as error:
        reason = str(error)[:200]
        raise InputError(f"{what} is not valid JSON ({reason}); save or download the adapter again") from None
    if not isinstance(values, dict):
        raise InputError(f"{what} holds a JSON {type(values).__name__}, an object with fields is needed")
    return values


def shown(value: object) -> str:
    """A JSON value in a message: on one line and short."""
    try:
        return json.dumps(value)[:80]
    except RecursionError:
        return "nested too deeply"


def is_plain(text: str) -> bool:
    """Whether a text has neither control characters nor halves of characters, which nothing can print or store."""
    return UNPRINTABLE.search(text) is None
