"""Where adapters lie and what they are called: paths, ``NAME=PATH:WEIGHT`` on the command line, Hub ids."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LONGEST_NAME = 200
"""Bytes: file systems stop at 255 and the unfinished output needs room for its own suffix."""


@dataclass(frozen=True, slots=True)
class Found:
    """A path that exists and the name it gives by default."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter as the command line names it: ``PATH``, ``PATH:WEIGHT`` or ``NAME=PATH[:WEIGHT]``.

    ``weight`` is ``None`` where none was given.
    """

    name: str
    path: Path
    weight: float | None = None


def parse(text: str) -> AdapterSpec:
    """Reads one adapter argument; an existing path wins over a reading with ``:`` or ``=``.

    Raises :class:`InputError` for what exists in no reading, a weight that is no finite number, or an
    unusable name.
    """
    readings = list(_readings(text))
    exists = next((r for r in readings if _exists(r[1])), None)
    # Where nothing exists, the reading with the most parts is what was meant: it gives the clearest message,
    # and a Hub id is not there yet.
    name, path, weight = exists or readings[-1]
    found = find(path)
    name = found.name if name is None else name
    check_name(name)
    return AdapterSpec(name, found.path, None if weight is None else _weight(weight, text))


def parse_all(texts: Iterable[str]) -> list[AdapterSpec]:
    """Reads the adapter arguments of one command, whose names must differ."""
    specs = [parse(text) for text in texts]
    check_names_differ((s.name, str(s.path)) for s in specs)
    return specs


def find(path: str | Path) -> Found:
    """The existing path, or the local copy of the Hub id, that ``path`` means."""
    text = str(path)
    if not text:
        raise InputError("an adapter path is empty; pass a PEFT directory")
    if _exists(text):
        local = Path(text).expanduser()
        # "." and ".." have a name only when written out; links keep the name they were given.
        return Found(local, Path(os.path.abspath(local)).name)
    if HUB_ID.fullmatch(text):
        return Found(_from_hub(text), text.rpartition("/")[2])
    missing = next((p for p in reversed(Path(text).parents) if not _exists(p)), None)
    reason = "" if missing is None else f" ({missing} does not exist)"
    raise InputError(f"there is no file or directory {text}{reason}; correct the path, or give a Hub id as org/name")


def check_name(name: str) -> None:
    """Refuses names that cannot be a folder of their own inside an output."""
    problem = None
    if not name or name.isspace():
        problem = "is empty"
    elif "/" in name or "\\" in name:
        problem = "has a path separator"
    elif name.startswith("."):
        problem = "starts with a dot"
    elif any(ord(c) < 32 or ord(c) == 127 for c in name):
        problem = "has control characters"
    elif len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    if problem is not None:
        raise InputError(
            f"the adapter name {name[:60]!r} {problem}, but names become folders of the output; give "
            "another one: NAME=PATH"
        )


def check_names_differ(named: Iterable[tuple[str, str]]) -> None:
    """Refuses two adapters of one name, given ``(name, where it comes from)``; case does not tell names
    apart."""
    seen: dict[str, str] = {}
    for name, where in named:
        other = seen.get(name.casefold())
        if other is not None:
            raise InputError(
                f"two adapters are called {name!r} ({other} and {where}); name them apart, for example "
                f"{name}={other} {name}-2={where}"
            )
        seen[name.casefold()] = where


def _readings(text: str) -> Iterable[tuple[str | None, str, str | None]]:
    """``(name, path, weight)`` as ``text`` can be split, from no split to every split."""
    yield None, text, None
    head, colon, weight = text.rpartition(":")
    if colon and head:
        yield None, head, weight
    # A separator before "=" means that "=" belongs to the path.
    name, equals, rest = text.partition("=")
    if equals and "/" not in name:
        yield name, rest, None
        head, colon, weight = rest.rpartition(":")
        if colon and head:
            yield name, head, weight


def _weight(text: str, argument: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(
            f"in {argument!r} the weight {text!r} is no finite number; write PATH:WEIGHT, such as legal:0.7"
        )
    return weight


def _exists(path: str | Path) -> bool:
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
