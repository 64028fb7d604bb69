"""Commands under a limit, whose output goes to the log as it comes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = sorted(Path("/usr/local").glob("cuda*/bin"))  # where CUDA's tools are when they are not on the PATH


class Failed(Exception):
    """A stage that failed, in a sentence.

    ``output``: what its command printed. ``again``: the smallest command that shows it, for the stage ``failures``.
    """

    def __init__(self, sentence: str, output: str = "", again: Command | None = None) -> None:
        super().__init__(sentence)
        self.output, self.again = output, again


class TookTooLong(Failed):
    """A command that was stopped at its limit."""


class Skipped(Exception):
    """A stage, or a part of one, that cannot run here, in a sentence."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments and what it gets beside the environment of this process."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *self.words])

    def under(self, *words: str, **environment: str) -> Command:
        """This command as the arguments of another."""
        return Command((*words, *self.words), {**self.environment, **environment})


def tool(name: str) -> str | None:
    """Where a program of CUDA is."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, CUDA)]))


def lines_of(words: Sequence[str], limit: float = 10.0) -> list[str]:
    """What a command prints, or nothing where it cannot be run or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else [line.strip() for line in done.stdout.splitlines() if line.strip()]


def last_line(output: str) -> str:
    """The last line that is not empty, cut to what fits into a table."""
    return next((line.strip()[:200] for line in reversed(output.splitlines()) if line.strip()), "no output")


def variables(command: Command) -> dict[str, str]:
    """The environment of a command: sources from this checkout, output as it comes."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, CUDA)])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **command.environment}


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs commands in the source folder. ``python``: what runs Python, an interpreter and what stands before its
    arguments."""

    log: Path
    python: tuple[str, ...] = (sys.executable,)

    def python_command(self, *arguments: str, **environment: str) -> Command:
        return Command((*self.python, *arguments), environment)

    def start(self, command: Command) -> Running:
        """Starts a command and does not wait; its output goes to the log."""
        with self.log.open("ab") as file:
            file.write(f"$ {command}\n".encode())
            file.flush()
            begin = file.tell()
            process = subprocess.Popen(
                command.words, cwd=ROOT, env=variables(command), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Running(command, process, self.log, begin)

    def run(self, command: Command, limit: float) -> str:
        """What a command prints. Raises :class:`TookTooLong` and :class:`Failed`."""
        return self.start(command).result(limit)


@dataclass(frozen=True, slots=True)
class Running:
    """A command that was started."""

    command: Command
    process: subprocess.Popen[bytes]
    log: Path
    begin: int

    def result(self, limit: float) -> str:
        """Waits ``limit`` seconds at the most, then stops the command and all that it started."""
        try:
            self.process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            self.stop()
            sentence = f"{self._name()} took more than {limit:.0f} s"
            raise TookTooLong(sentence, self.output(), self.command) from None
        except BaseException:  # this program is to end
            self.stop()
            raise
        if self.process.returncode:
            output = self.output()
            sentence = f"{self._name()} ended with {self.process.returncode}: {last_line(output)}"
            raise Failed(sentence, output, self.command)
        return self.output()

    def stop(self) -> None:
        """Ends it, with all processes that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.begin)
            return file.read().decode(errors="replace")

    def move_to(self, log: Path) -> None:
        """Puts what was said into another log, and removes its own."""
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {self.command}\n{self.output()}")
        self.log.unlink()

    def _name(self) -> str:
        words = " ".join(self.command.words[:4])
        return words if len(self.command.words) <= 4 else f"{words} …"


class Clock:
    """Seconds that are left of a limit, for stages of several commands."""

    def __init__(self, limit: float) -> None:
        self.ends = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()
