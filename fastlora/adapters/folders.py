"""A folder that holds adapters: which of its entries take part, and why the others do not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastlora.adapters.loading import KINDS, Element, load
from fastlora.core.data import AdapterData, LoraData
from fastlora.core.names import CONFIG_NAME
from fastlora.errors import FastloraError, InputError
from fastlora.files.disk_errors import partial_of
from fastlora.formats import find_format, is_certain
from fastlora.runtime.progress import track

LISTED = 8  # entries that one note names

ANY = tuple(KINDS)
"""Every kind of record."""


def holds_adapters(path: Path) -> bool:
    """Whether a path is a folder that is no adapter itself and has adapters of some format directly in it."""
    if is_certain(path) or not path.is_dir():
        return False
    if _holds_folders_alone(path):
        return True
    if find_format(path) is not None:
        return False
    try:
        return any(_detected(entry) for entry in path.iterdir())
    except OSError:
        return False


def _holds_folders_alone(path: Path) -> bool:
    """Whether there are no files in a folder, and a PEFT directory among its folders: then no format takes it for an
    adapter."""
    try:
        with os.scandir(path) as entries:
            found = list(entries)
        folders = all(entry.is_dir(follow_symlinks=False) for entry in found)
    except OSError:
        return False
    return folders and any(is_certain(Path(entry.path)) for entry in found)


def load_folder(
    folder: Path,
    kinds: tuple[type[AdapterData], ...] = (LoraData,),
    *,
    family: str | None = None,
    rank: int | None = None,
) -> tuple[list[Element], list[str]]:
    """The adapters of ``kinds`` directly in a folder, ``checkpoint-9`` before ``checkpoint-10``, and notes on what was
    left out: which entries, and why. ``family``, ``rank``: as :func:`fastlora.load` takes them. Raises
    :class:`InputError` when nothing is left."""
    taken: list[Element] = []
    left_out: dict[str, str] = {}
    for entry in track(sorted(folder.iterdir(), key=_natural), "loading"):
        try:
            reason = _no_adapter(entry, kinds)
            if reason is None:
                element = load(entry, family=family, rank=rank)
                reason = None if isinstance(element, kinds) else _other_kind([type(element)])
        except FastloraError as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is None:
            taken.append(element)
        else:
            left_out[entry.name] = reason
    if not taken:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:LISTED])
        raise InputError(f"{folder} holds no adapter that can be used here ({told})")
    return taken, _notes(folder, left_out)


def _natural(entry: Path) -> tuple[list[str | int], str]:
    """A key that orders numbers in names by their values; text and digits take turns in it."""
    parts = re.split(r"(\d+)", entry.name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], entry.name


def _detected(entry: Path) -> bool:
    try:
        return find_format(entry) is not None
    except OSError:  # told when the entry is loaded
        return False


def _no_adapter(entry: Path, kinds: tuple[type[AdapterData], ...]) -> str | None:
    """Why an entry is not even loaded."""
    if partial_of(Path(entry.name)) is not None:
        return "an output that was never finished"
    format = find_format(entry)
    if format is None:
        return f"no adapter: it has no {CONFIG_NAME}" if entry.is_dir() else "a file that is no adapter"
    # A task vector is as large as its model, so it is not read only to be left out.
    if format.WRITES and not any(issubclass(kind, kinds) for kind in format.WRITES):
        return _other_kind([KINDS[kind] for kind in format.WRITES])
    return None


def _other_kind(found: Iterable[type[Element]]) -> str:
    return f"it is {' or '.join(kind.kind for kind in found)}, and LoRA adapters are needed here"


def _notes(folder: Path, left_out: dict[str, str]) -> list[str]:
    """One note for every reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    notes = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        notes.append(f"{folder}: left out {', '.join(names[:LISTED])}{more}: {reason}")
    return notes
