"""Where adapters lie and what they are called: paths, ``NAME=PATH:WEIGHT`` on the command line, Hub ids."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Found:
    """A path that exists and the name it gives by default."""

    path: Path
    name: str


def find(path: str | Path) -> Found:
    """The existing path, or the local copy of the Hub id, that ``path`` means."""
    text = str(path)
    if not text:
        raise InputError("an adapter path is empty; pass a PEFT directory")
    if exists(text):
        local = Path(text).expanduser()
        # "." and ".." have a name only when written out; links keep the name they were given.
        return Found(local, Path(os.path.abspath(local)).name)
    if HUB_ID.fullmatch(text):
        return Found(_from_hub(text), text.rpartition("/")[2])
    missing = next((p for p in reversed(Path(text).parents) if not exists(p)), None)
    reason = "" if missing is None else f" ({missing} does not exist)"
    raise InputError(f"there is no file or directory {text}{reason}; correct the path, or give a Hub id as org/name")


def exists(path: str | Path) -> bool:
    try:
        return path != "" and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # Too long, with a null character, or of an unknown user: no such path.
        return False


def _hub_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _from_hub(repo: str) -> Path:
    cached = _cached(repo)
    if cached is not None:
        return cached
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{repo} is neither a path nor in the local Hub cache ({_hub_cache()}); correct the path, or "
            "to download it from the Hub: pip install 'fastlora[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=["adapter_config.json", "adapter_model.*"]))
    except Exception as error:
        # The Hub client has many kinds of errors (network, permissions, names), all of which mean the same
        # here.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{repo} is no path here and could not be fetched from the Hub: {reason[0][:300]}") from None


def _cached(repo: str) -> Path | None:
    """The snapshot of the default branch in the local Hub cache, when it holds an adapter."""
    folder = _hub_cache() / ("models--" + repo.replace("/", "--"))
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    weights = any((snapshot / f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin"))
    return snapshot if weights and (snapshot / "adapter_config.json").exists() else None
