"""What fastlora wrote earlier, by what the files say of themselves: only that is replaced by ``overwrite=True``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from fastlora.errors import OutputError

Overwrite = bool | Literal["force"]
"""Of something that exists: refuse it, replace it where fastlora wrote it, or replace it whatever it is."""

MARK = "fastlora"
"""In the metadata of tensors and pictures."""

HEADINGS = (
    b"similarity,adapter",
    b"adapter,module",
    b"report,module",
    b"what,opponent,theirs",
    b"what,threads,base",
    b"# Benchmarks\n\n`fastlora bench ",
    b"# Recipe of fastlora",
    b'<!doctype html>\n<html lang="en">\n<!-- Made by fastlora',
)
"""How tables begin, the page of benchmarks, recipes and pages about pools."""

PICTURES = frozenset({".png", ".pdf", ".svg", ".jpg", ".jpeg", ".eps", ".ps"})

LARGEST_HEADER, LARGEST_LOOK = 100_000_000, 1 << 26
"""Bytes of a header of tensors, and of any other file that is looked at."""


def is_ours(file: Path) -> bool:
    """Whether a file says that fastlora wrote it: adapters, task vectors, reports, tables, pictures, benchmarks,
    cards that nobody has edited."""
    try:
        if not file.is_file():
            return False
        if file.suffix == ".safetensors":
            return MARK in _metadata(file)
        if file.name == "adapter_config.json":  # written after the tensors beside it
            beside = ("adapter_model.safetensors", "adapters.safetensors")
            return any(MARK in _metadata(f) for name in beside if (f := file.with_name(name)).is_file())
        with file.open("rb") as opened:
            content = opened.read(LARGEST_LOOK)
    except OSError:
        return False
    if file.suffix == ".json":
        return content.startswith(b'{"mode": "') and b'"reports": [' in content
    if file.suffix.lower() in PICTURES:
        return MARK.encode() in content
    if content.startswith(HEADINGS):
        return True
    from fastlora.core.card import is_card  # commands that write nothing do without

    return is_card(content)


def _metadata(file: Path) -> dict[str, object]:
    """The metadata in the header of a safetensors file; none where it has no readable header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        raw = opened.read(length) if length <= LARGEST_HEADER else b""
    try:
        metadata = json.loads(raw).get("__metadata__")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def digest_of(content: Path | bytes) -> str:
    """What tells the contents of a file that fastlora copied or made."""
    import hashlib  # OpenSSL is not for `--help`

    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _put_beside(directory: Path) -> dict[Path, str]:
    """The files that were put beside tensors, as these tell, and what they held."""
    found: dict[Path, str] = {}
    for file in directory.rglob("*.safetensors"):
        try:
            told = json.loads(str(_metadata(file).get(MARK)))
        except (OSError, ValueError, RecursionError):
            continue
        files = told.get("files") if isinstance(told, dict) else None
        if isinstance(files, dict):
            found |= {directory / str(path): str(digest) for path, digest in files.items()}
    return found


def foreign_files(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Files in a directory that are no part of an earlier output: of other names, or not written by fastlora, and not
    put there by it."""
    beside = _put_beside(directory)
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            if not file.is_symlink() and file in beside and digest_of(file) == beside[file]:
                continue
            if file.is_symlink() or not any(fnmatch(name, p) for p in patterns) or not is_ours(file):
                yield file
        for name in folders:
            if Path(folder, name).is_symlink():
                yield Path(folder, name)


def check_file(path: Path, *, overwrite: Overwrite) -> None:
    """Refuses a file as output that exists, unless it may be replaced, and what is no file."""
    if path.is_dir():
        raise OutputError(f"the output {path} is a directory; give a file name")
    if not os.path.lexists(path) or overwrite == "force":
        return
    if not overwrite:
        raise OutputError(
            f"the output {path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )
    if not is_ours(path):
        raise OutputError(
            f"the output {path} exists and was not written by fastlora; choose another name, or replace it with "
            "--force (overwrite='force')"
        )
