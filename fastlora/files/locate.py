"""Where adapters lie and what they are called: paths and Hub ids."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError
from fastlora.files import hub


@dataclass(frozen=True, slots=True)
class LocatedPath:
    """A path that exists and the name it gives by default."""

    path: Path
    name: str


def find(path: str | Path) -> LocatedPath:
    """The existing path, or the local copy of the Hub id, that ``path`` means."""
    text = str(path)
    if not text:
        raise InputError("an adapter path is empty; pass a PEFT directory or a file")
    if exists(text):
        local = path if isinstance(path, Path) and text[0] != "~" else Path(text).expanduser()
        # "." and ".." have a name only when written out; links keep the name they were given.
        return LocatedPath(local, os.path.basename(os.path.abspath(local)))
    _refuse_dangling(Path(text))
    candidates = hub.places(text)
    if candidates and ("@" in text or not candidates[0].folder or _is_hub_file(candidates[0])):
        place, folder = hub.fetched(text, candidates)
        return LocatedPath(folder, place.name)
    if candidates:  # org/name/folder: more often a path with a slip than a folder of the Hub, so nothing is fetched
        with contextlib.suppress(ImportError):
            cached = hub.cached(candidates[0])
            if cached is not None:
                return LocatedPath(cached, candidates[0].name)
    missing = next((p for p in reversed(Path(text).parents) if not exists(p)), None)
    reason = "" if missing is None else f" ({missing} does not exist)"
    raise InputError(
        f"there is no file or directory {text}{reason}; correct the path, or give a Hub id as org/name, "
        "org/name@revision, org/name@revision/folder or org/name/file.safetensors"
    )


def _is_hub_file(place: hub.HubPlace) -> bool:
    """Whether ``org/name/file.safetensors`` is a file of the Hub, and no path with a slip in a folder that exists."""
    return place.is_file and not exists(place.repo.partition("/")[0])


def _refuse_dangling(path: Path) -> None:
    """Refuses a path at or through a link whose target does not exist."""
    try:
        local = path.expanduser()
        link = next((p for p in (local, *local.parents) if p.is_symlink() and not p.exists()), None)
        target = "" if link is None else os.readlink(link)
    except (OSError, ValueError, RuntimeError):  # no path at all
        return
    if link is not None:
        raise InputError(f"{link} is a link to {target}, which does not exist; copy or download what it stands for")


def exists(path: str | Path) -> bool:
    """Whether there is such a path; ``False`` for what cannot be a path."""
    try:
        if (text := os.fspath(path))[:1] != "~":
            return text != "" and os.path.exists(text)
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # Too long, with a null character, or of an unknown user: no such path.
        return False
