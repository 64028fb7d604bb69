"""Outputs that several ranks make together: where each writes its part, and how that gets to the first rank where they
have no file system in common.

The first rank makes what will be the output. Another rank has a place of its own beside it for what it writes in the
same way and nobody needs; tensor files alone lie where the first has them. A rank that does not see the first's place,
since it is on another machine, has its place there, writes its tensors into a file of its own, and sends them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastlora.errors import InputError
from fastlora.runtime.ranks import Ranks, current, from_first, gathered
from fastlora.runtime.system import read_at, write_all_at

CHUNK = 16 * 2**20  # bytes that are sent at once

ATTEMPTS = 100  # to remove what another removes at the same time

Span = tuple[int, int]
"""``(start, size)`` in a file."""


def begun(
    name: Callable[[], Path],
    make: Callable[[Path], object] = lambda path: None,
    *,
    folder: bool,
    lasting: bool = False,
) -> Path:
    """Where this rank writes what the first begins: it chooses its ``name`` and then ``makes`` it. Where one process
    does all, that name.

    ``folder``: whether it is a folder. ``lasting``: it stays where a rank is gone, for a run that goes on with it.
    :func:`ended` takes it back.
    """
    staging = from_first("naming the output", name)
    members = current()
    if members is None:
        make(staging)
        return staging
    members.places[staging] = staging  # before it is there: who made it may be gone a moment later
    members.lasting |= {staging} if lasting else set()
    from_first("making the output", lambda: make(staging))
    seen = _seen(members, staging)
    if members.is_first:
        return staging
    if seen:
        root = staging.with_name(f"{staging.name}.rank-{members.rank}")
        shutil.rmtree(root, ignore_errors=True)  # of a run that died
        root.mkdir()
    else:
        root = Path(tempfile.mkdtemp(prefix="fastlora-rank-"))
    own = root / staging.name
    members.places[own] = staging if seen else None
    if folder:
        own.mkdir()
    return own


def _seen(members: Ranks, staging: Path) -> bool:
    """Whether this rank sees what the first writes. All learn whether some do not."""
    probe, token = staging.with_name(f"{staging.name}.seen"), secrets.token_hex(16)
    token = from_first("looking for the output", lambda: (probe.write_text(token), token)[1])
    try:
        sights = gathered("looking for the output", lambda: is_there(probe, token))
    finally:
        if members.is_first:
            probe.unlink(missing_ok=True)
    members.apart = [rank for rank, sees in enumerate(sights) if not sees]
    return sights[members.rank]


def is_there(probe: Path, token: str) -> bool:
    """Whether a file that another rank wrote is seen here."""
    with contextlib.suppress(OSError):
        return probe.read_text() == token
    return False


def joint(own: Path) -> Path | None:
    """Where the first rank has what this one writes in its ``own`` place, if this one sees that."""
    return own.parent.with_name(own.name) if own.parent.name.startswith(f"{own.name}.rank-") else None


def ended(own: Path) -> None:
    """Forgets a place that :func:`begun` gave, and removes it where it is this rank's own. One that the first rank made
    is remembered where that may be gone: :func:`remove_all` has to find it."""
    members = current()
    if members is None:
        return
    staging = members.places.get(own, own)
    if staging != own:
        _remove(own.parent)
    elif members.is_first:
        _remove_beside(own)  # of a rank that is gone
    is_left = members.is_broken and not members.is_first
    for path in (own, None if is_left else staging):  # when it is done: until then, another thread may have to do it
        if path is not None:
            members.places.pop(path, None)


def remove_all(members: Ranks) -> None:
    """Removes all that is unfinished, also what other ranks write: one of them is gone."""
    for own, staging in list(members.places.items()):
        if staging is None:
            _remove(own.parent)
        else:
            if staging not in members.lasting:
                _remove(staging)
            _remove_beside(staging)


def _remove_beside(staging: Path) -> None:
    for path in staging.parent.glob(f"{glob.escape(staging.name)}.*"):
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a file or a folder, also where another thread or rank is about to."""
    for _ in range(ATTEMPTS):
        if not os.path.lexists(path):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def place(path: Path) -> Path:
    """Where a file lies that all ranks write together: where the first has it, or this rank's own if it does not see
    that."""
    members = current()
    for own, staging in () if members is None else members.places.items():
        if staging is not None and (path == own or own in path.parents):
            return staging / path.relative_to(own)
    return path


def require_common(what: str) -> None:
    """Raises :class:`InputError` on all ranks where some do not see the output."""
    members = current()
    if members is not None and members.apart:
        raise InputError(
            f"{what}: rank {members.apart[0]} does not see the output of rank 0; start it on one machine, or write to "
            "a file system that all see"
        )


def is_apart() -> bool:
    """Whether this process is a rank that does not see what the first writes."""
    members = current()
    return members is not None and members.rank in members.apart


def is_made_here() -> bool:
    """Whether this process makes a file that all write: the first rank, and those that write one of their own."""
    members = current()
    return members is None or members.is_first or is_apart()


def sent(path: Path, spans: Sequence[Span]) -> None:
    """Brings the ``spans`` that this rank wrote in its own file to the first rank's file at ``path``: of ranks that do
    not see it. All ranks call it, in the same order of files."""
    members = current()
    if members is None or not members.apart:
        return
    sends = is_apart()
    everybodys = gathered("sending results", lambda: list(spans) if sends else [])
    problem: Exception | None = None
    with contextlib.ExitStack() as stack:
        file = -1
        try:
            if members.is_first or sends:
                file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
                stack.callback(os.close, file)
        except OSError as error:
            problem = error
        for rank, of_rank in enumerate(everybodys):
            if not members.is_first and rank != members.rank:
                continue
            for start, size in _chunks(of_rank):
                # Whatever goes wrong here, the other side waits for bytes: it is told afterwards.
                data = bytearray(size)
                try:
                    if not members.is_first and problem is None:
                        _read_all(file, data, start)
                except OSError as error:
                    problem = error
                data = members.passed(data, rank)
                try:
                    if members.is_first and problem is None:
                        write_all_at(file, memoryview(data), start)
                except OSError as error:
                    problem = error

    def tell() -> None:
        if problem is not None:
            raise problem

    gathered("results that were sent", tell)


def _chunks(spans: Sequence[Span]) -> Iterator[Span]:
    for start, size in spans:
        for first in range(start, start + size, CHUNK):
            yield first, min(CHUNK, start + size - first)


def _read_all(file: int, data: bytearray, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = read_at(file, view, offset)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[count:], offset + count
