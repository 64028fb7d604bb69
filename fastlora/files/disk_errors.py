"""What goes wrong while an output is written, as sentences about the output."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastlora.errors import FastloraError, OutputError

PARTIAL = re.compile(r"\..+\.partial-(\d+)(-\d+)?(\.rank-\d+)?")
"""The name of what is not finished yet, ``.<name>.partial-<pid>``, and of the place beside it of another rank."""

UNFINISHED = "unfinished"
"""How the name ends of what may be resumed, ``.<name>.unfinished``."""

PART = ".part"
"""What no tool loads: files of tensors that are not whole have it behind their names."""

REASONS = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "permission denied; write elsewhere or change the permissions",
    errno.EPERM: "permission denied; write elsewhere or change the permissions",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EFBIG: "the file is larger than is allowed here; write elsewhere",
    errno.EIO: "the disk reported an input/output error; check it or write elsewhere",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while ``path`` is written into one :class:`OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FastloraError):
            raise
        raise output_error(error, path) from error


def partial_of(path: Path | str) -> Path | None:
    """The unfinished output that ``path`` is or lies in, if any."""
    text = os.path.abspath(path)
    if ".partial-" not in text and UNFINISHED not in text:  # as almost always
        return None
    absolute = Path(text)
    return next((p for p in (absolute, *absolute.parents) if _target_of(p.name) is not None), None)


def _target_of(name: str) -> str | None:
    """The name that an unfinished output will have."""
    if PARTIAL.fullmatch(name):
        return name[1:].rpartition(".partial-")[0]
    end = f".{UNFINISHED}"
    return name[1:].removesuffix(end) if name.startswith(".") and name.endswith(end) and name != end else None


def output_error(error: OSError | SafetensorError, path: Path) -> OutputError:
    """What went wrong while ``path`` was written, in terms of the finished output."""
    number = errno_of(error)
    reason = REASONS.get(number) if number is not None else None
    return OutputError(f"{finished(path)} could not be written: {reason or error}")


def finished(path: Path) -> Path:
    """The place that a path inside an unfinished output would have had in the finished one."""
    unfinished = partial_of(path)
    if unfinished is None:
        return path
    target, inside = unfinished.with_name(str(_target_of(unfinished.name))), path.relative_to(unfinished)
    if inside.name.removesuffix(PART) in ("", target.name):  # the output is one file
        return target
    return target / inside.with_name(inside.name.removesuffix(PART))


def errno_of(error: BaseException) -> int | None:
    """The system's error number, also from the text that safetensors makes of it."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def translated(error: BaseException, path: Path) -> OutputError | None:
    """The error to raise instead of one that left the block; errors that are not about the output stay as
    they are."""
    if isinstance(error, FastloraError) or not isinstance(error, OSError | SafetensorError):
        return None
    about = getattr(error, "filename", None)
    here = about is None or path.parent in Path(os.path.abspath(os.fsdecode(about))).parents
    return output_error(error, path) if here and errno_of(error) in REASONS else None
