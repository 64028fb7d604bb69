"""Where adapters lie and what they are called: paths, ``NAME=PATH:WEIGHT`` on the command line, Hub ids."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class LocatedPath:
    """A path that exists and the name it gives by default."""

    path: Path
    name: str


def find(path: str | Path) -> LocatedPath:
    """The existing path, or the local copy of the Hub id, that ``path`` means."""
    text = str(path)
    if not text:
        raise InputError("an adapter path is empty; pass a PEFT directory")
    if exists(text):
        local = Path(text).expanduser()
        # "." and ".." have a name only when written out; links keep the name they were given.
        return LocatedPath(local, Path(os.path.abspath(local)).name)
    if HUB_ID.fullmatch(text):
        return LocatedPath(_from_hub(text), text.rpartition("/")[2])
    missing = next((p for p in reversed(Path(text).parents) if not exists(p)), None)
    reason = "" if missing is None else f" ({missing} does not exist)"
    raise InputError(f"there is no file or directory {text}{reason}; correct the path, or give a Hub id as org/name")


def exists(path: str | Path) -> bool:
    """Whether there is such a path; ``False`` for what cannot be a path."""
    try:
        return path != "" and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # Too long, with a null character, or of an unknown user: no such path.
        return False


def _from_hub(repo: str) -> Path:
    """The snapshot of the default branch: the one in the local Hub cache if it holds an adapter, else a download."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{repo} is neither a path nor can it be looked up in the Hub or its local cache; correct the path, or "
            "to take it from the Hub: pip install 'fastlora[hub]'"
        ) from None
    files = ["adapter_config.json", "adapter_model.*"]
    reason = ""
    for local in (True, False):
        try:
            snapshot = Path(snapshot_download(repo, allow_patterns=files, local_files_only=local))
        except Exception as error:
            # The Hub client has many kinds of errors (not cached, network, permissions, names). In the cache all of
            # them mean "not there", and after a download all of them mean the same here.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if not local or all(any(snapshot.glob(name)) for name in files):
            return snapshot
    raise InputError(f"{repo} is no path here and could not be fetched from the Hub: {reason[:300]}")
