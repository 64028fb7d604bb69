"""Output directories that exist whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from fastlora.core.names import CARD_NAME
from fastlora.errors import OutputError
from fastlora.files.disk_errors import PARTIAL, translated, writing
from fastlora.files.earlier import Overwrite, check_file, foreign_files
from fastlora.runtime.joint_outputs import begun, ended, joint
from fastlora.runtime.ranks import from_first, is_first, together
from fastlora.runtime.system import is_running

OUTPUT_FILES = ("adapter_config.json", "*.safetensors", CARD_NAME, "report.json", "*.png", "*.html")
"""What an earlier output consists of, where the files say that fastlora wrote them: only such files are ever deleted by
overwriting."""

REPLACED = re.compile(r"\..+\.replaced-(\d+)(-\d+)?")


class OutputDirectory:
    """``with OutputDirectory(path) as staging:`` — what is written to ``staging`` becomes ``path`` at the
    end.

    The staging directory ``.<name>.partial-<pid>`` lies beside the target. It is renamed
    when the block ends, and removed when the block raises; until the rename the target is as it was. With
    ``overwrite`` an earlier output is moved aside and deleted only after the new one is in place; with
    ``overwrite="force"`` so is whatever is there.

    Raises :class:`OutputError`: from the constructor, before any work, when the target exists (without
    ``overwrite``), is no earlier output (with it) or cannot be written; from the block when writing fails.
    Ranks that work together make one output: the others write into a directory of their own, which is thrown away but
    for the tensor files that all write together. The rename waits for all.

    ``notices`` holds what is worth telling afterwards, ``written`` whether the output is in place. ``files`` are the
    name patterns that an earlier output may hold beside :data:`OUTPUT_FILES`.
    """

    def __init__(self, path: str | Path, *, overwrite: Overwrite = False, files: Iterable[str] = ()) -> None:
        self.path = Path(path).expanduser().resolve()
        self.overwrite = overwrite
        self.notices: list[str] = []
        self.written = False
        self._files = (*OUTPUT_FILES, *files)
        self._staging: Path | None = None
        self._placing = False  # whether the rename that ends the work may have been made, by the first rank
        self._replaced: Path | None = None
        self._made = [p for p in self.path.parents if not os.path.lexists(p)]
        self._own: Path | None = None  # where a rank writes that is not the first
        if not self.path.name:
            raise OutputError(f"{path} is no name for an output; give a directory that can be made, such as out/merged")
        self._check_target()
        self._check_parent()

    @property
    def again(self) -> str:
        """What to do after an interruption."""
        return "run the same command again"

    def refuse_inputs(self, paths: Iterable[str | Path]) -> None:
        """Raises :class:`OutputError` when the target is an input, holds one or lies in one."""
        for path in paths:
            source = Path(path).expanduser().resolve()
            if self.path == source or self.path in source.parents or source in self.path.parents:
                raise OutputError(
                    f"the output {self.path} and the input {source} are one place or one inside the other; "
                    "write to another directory"
                )

    lasts = False
    """Whether what is unfinished stays, for another run."""

    def __enter__(self) -> Path:
        own = begun(self._named, self._make_staging, folder=True, lasting=self.lasts)
        if not is_first():
            self._own = own
        return own

    def _named(self) -> Path:
        with writing(self.path):
            return next(_names_beside(self.path, "partial"))

    def _make_staging(self, staging: Path) -> None:
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._report_leftovers()
                self._staging = staging  # known before it is there: a signal may come right after it is made
                staging.mkdir()
        except BaseException:
            self.discard()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._staging or self._own, "__exit__ without __enter__"
        problem = None if error is None else translated(error, self.path)
        if problem is not None:
            problem.__cause__ = error
        try:
            together("finishing the output", problem or error)
            if error is None:
                self._placing = True
                from_first("placing the output", self._place)
        finally:
            self.discard()
        if problem is not None:
            raise problem

    def _place(self) -> None:
        assert self._staging is not None
        with writing(self.path):
            self._check_target()
            self._put_in_place(self._staging)

    def discard(self, *, whole: bool = False) -> None:
        """Removes what is unfinished. Leaving the block does so too, unless a signal comes just before it is entered or
        while it is left. ``whole``: also what the first rank made, where this is another."""
        staging = self._staging or (self._own and joint(self._own))
        if self._placing:  # seen on the disk, since a signal may come right after the rename
            self.written = staging is not None and not os.path.lexists(staging)
            self._placing = False
        for own in (self._own, self._staging):
            if own is not None:
                ended(own)
        if self._own is not None and not whole:
            return
        for path in (staging, self._replaced):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(self.path):
            self._remove_parents()

    def _check_target(self) -> None:
        if not os.path.lexists(self.path):
            return
        if self.overwrite == "force":
            self._check_force()
            return
        if not self.path.is_dir():
            raise OutputError(
                f"the output {self.path} exists and is a file; choose another name, or replace it with --force "
                "(overwrite='force')"
            )
        if not self.overwrite:
            raise OutputError(
                f"the output {self.path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
            )
        foreign = next(foreign_files(self.path, self._files), None)
        if foreign is not None:
            raise OutputError(
                f"the output {self.path} exists and is no earlier output: it holds {foreign.relative_to(self.path)}, "
                "which fastlora did not write and overwriting would delete; choose another name, or replace it with "
                "--force (overwrite='force')"
            )

    def _check_force(self) -> None:
        """Even by force, no folder is replaced that the user stands in or lives in."""
        for place, what in ((Path.cwd(), "the current directory"), (Path.home(), "the home directory")):
            if self.path == place or self.path in place.parents:
                raise OutputError(f"the output {self.path} is or holds {what}; choose another name")

    def _check_parent(self) -> None:
        parent = next(p for p in self.path.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise OutputError(f"the output {self.path} cannot be made: {parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"the output {self.path} cannot be made: {parent} is not writable; write elsewhere")

    def _remove_parents(self) -> None:
        """Removes the folders that were made to hold the target, unless something else has come to lie in them."""
        with suppress(OSError):
            for parent in self._made:
                parent.rmdir()

    def _report_leftovers(self) -> None:
        start = f".{self.path.name}."
        for name in sorted(name for name in os.listdir(self.path.parent) if name.startswith(start)):
            match = PARTIAL.fullmatch(name) or REPLACED.fullmatch(name)
            if match and not is_running(int(match[1])):
                # Not deleted: on a shared file system the process may be running on another machine.
                self.notices.append(f"{self.path.parent / name} was left by a run that died and can be deleted")

    def _put_in_place(self, staging: Path) -> None:
        if not os.path.lexists(self.path):
            os.rename(staging, self.path)
            return
        old = next(name for name in _names_beside(self.path, "replaced") if _made(name))
        try:
            moved = old if self.path.is_dir() else old / self.path.name  # a file is put into a directory
            os.rename(self.path, moved)
            os.rename(staging, self.path)
        except BaseException:
            if os.path.lexists(self.path):
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(moved, self.path)
                shutil.rmtree(old, ignore_errors=True)
            raise
        self._replaced = old
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            self.notices.append(f"the earlier output could not be deleted and is now {old}")


@contextmanager
def replacing(path: Path, *, overwrite: Overwrite) -> Iterator[Path]:
    """``with replacing(path, overwrite=…) as staging:`` — the file that is written to ``staging`` becomes ``path`` at
    the end, and is removed when the block raises.

    Raises :class:`OutputError` when ``path`` exists and may not be replaced, is no file, or cannot be written.
    """
    check_file(path, overwrite=overwrite)

    def make(staging: Path) -> None:
        with writing(path):
            staging.parent.mkdir(parents=True, exist_ok=True)

    own = begun(lambda: path.with_name(f".{path.name}.partial-{os.getpid()}"), make, folder=False)
    try:
        try:
            yield own
        except BaseException as error:
            together("finishing the output", error)
            raise
        together("finishing the output")
        from_first("placing the output", lambda: _replace(own, path))
    finally:
        if is_first():
            own.unlink(missing_ok=True)
        ended(own)


def _replace(staging: Path, path: Path) -> None:
    with writing(path):
        os.replace(staging, path)


def _names_beside(path: Path, kind: str) -> Iterator[Path]:
    """Free names ``.<name>.<kind>-<pid>`` beside ``path``."""
    base = f".{path.name}.{kind}-{os.getpid()}"
    for attempt in range(1000):
        name = path.parent / (base if attempt == 0 else f"{base}-{attempt}")
        if not os.path.lexists(name):
            yield name
    raise OutputError(f"{path.parent} is full of unfinished outputs {base}-…; delete them")


def _made(directory: Path) -> bool:
    """Makes a directory, unless there is something of that name."""
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True
