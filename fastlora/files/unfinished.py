"""Outputs that take long: what is finished of them survives the process, and another one goes on with it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from fastlora.errors import FastloraError, OutputError
from fastlora.files.disk_errors import UNFINISHED, writing
from fastlora.files.earlier import Overwrite, check_file
from fastlora.files.output import OutputDirectory
from fastlora.runtime import system
from fastlora.runtime.joint_outputs import ended, place
from fastlora.runtime.ranks import from_first

JOURNAL, LOCK = "journal", "lock"


class ResumableOutput(OutputDirectory):
    """``with ResumableOutput(path, resume=…) as staging:`` — an :class:`OutputDirectory` that an interrupted run leaves
    behind as ``.<name>.unfinished``, for another one to go on with.

    One process holds it at a time. :meth:`begin` tells what was finished before; until then nothing of an unfinished
    run is touched. An error that a resumed run would meet as well leaves nothing, and neither does what stops a run
    before anything is finished. ``as_file``: the output is one file, the only one in ``staging`` of its name.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: Overwrite = False,
        resume: bool = False,
        as_file: bool = False,
        files: Iterable[str] = (),
    ) -> None:
        self.as_file, self.resume = as_file, resume
        self._lock: int | None = None
        self._journal: Path | None = None
        self._writing = threading.Lock()
        self._is_ours = self._is_worth_keeping = False
        super().__init__(path, overwrite=overwrite, files=files)
        self.unfinished = self.path.with_name(f".{self.path.name}.{UNFINISHED}")

    lasts = True

    @property
    def again(self) -> str:
        """What to do after an interruption."""
        return "go on by the same command with --resume" if self._is_worth_keeping else super().again

    def begin(self, digest: str) -> set[str]:
        """Begins the work that ``digest`` stands for, and returns what was finished of it, by keys.

        Raises :class:`OutputError` where the unfinished run was another one. What was finished before the machine was
        started anew may not have reached the disk, and is not counted.
        """
        assert self._staging is not None
        self._journal = path = self._staging / JOURNAL
        head = f"{digest} {system.boot()}"
        with writing(self.path):
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            if lines and lines[0] == head:
                self._is_ours, self._is_worth_keeping = True, len(lines) > 2
                if lines[-1]:  # was cut off, and is no key
                    self.finish("")
                return set(lines[1:-1])
            if lines and lines[0].partition(" ")[0] not in ("", digest):
                raise OutputError(
                    f"the unfinished run for {self.path} was another one: the base model, the adapters or their "
                    f"weights differ. Delete {self.unfinished} and begin anew"
                )
            path.write_text(head + "\n", encoding="utf-8")
        self._is_ours = True
        return set()

    def begin_together(self, digest: str) -> set[str]:
        """:meth:`begin` of ranks that work together: the first does it, and all note in one journal what they finish.
        Lines that two write at the same moment may be lost, where a file system cannot append; then they are done
        again."""
        done = from_first("beginning the output", lambda: self.begin(digest))
        if self._own is not None:
            self._journal = place(self._own / JOURNAL)
        return done

    def finish(self, key: str) -> None:
        """Notes that something is finished, from any thread."""
        assert self._journal is not None
        with self._writing, writing(self.path), self._journal.open("a", encoding="utf-8") as journal:
            journal.write(key + "\n")
            self._is_worth_keeping = True

    def _check_target(self) -> None:
        if self.as_file:
            check_file(self.path, overwrite=self.overwrite)
        else:
            super()._check_target()

    def _named(self) -> Path:
        return self.unfinished

    def _make_staging(self, staging: Path) -> None:
        there = staging.exists()
        if there and not self.resume:
            raise OutputError(
                f"an unfinished run for {self.path} is in {staging}: continue it with --resume (resume=True), or "
                "delete that folder"
            )
        if self.resume and not there:
            self.notices.append(f"there is no unfinished run for {self.path}; it was begun anew")
        with writing(self.path):
            staging.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if not system.lock(self._lock):
            self._close()
            raise OutputError(f"another process is writing {self.path}; wait for it, or write elsewhere")
        self._is_ours = not there
        self._staging = staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        except BaseException as found:
            error = found
            raise
        finally:
            if error is not None and self._is_ours and not (self._is_worth_keeping and _may_be_resumed(error)):
                shutil.rmtree(self.unfinished, ignore_errors=True)
                self._remove_parents()
            self._close()

    def _place(self) -> None:
        assert self._staging is not None
        self._close()
        for name in (JOURNAL, LOCK):
            (self._staging / name).unlink(missing_ok=True)
        if not self.as_file:
            super()._place()
            return
        with writing(self.path):
            self._check_target()
            os.replace(self._staging / self.path.name, self.path)
        shutil.rmtree(self._staging, ignore_errors=True)

    def discard(self, *, whole: bool = False) -> None:
        """Leaves what is unfinished where it is, for a resumed run. ``whole``: unless nothing of it is finished."""
        if self._placing:
            self.written = not os.path.lexists(self.unfinished)
            self._placing = False
        for own in (self._own, self._staging):
            if own is not None:
                ended(own)
        if whole and (self._own or self._is_ours) and not (self.resume or self._is_worth_keeping):
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self._remove_parents()
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _may_be_resumed(error: BaseException) -> bool:
    """Whether a run that goes on may get further: what its inputs are to blame for stops it again."""
    return not isinstance(error, FastloraError) or isinstance(error.__cause__, OSError)
