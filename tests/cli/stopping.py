"""Runs a command many times, each stopped at a point of its own. A program: settings on stdin, results on stdout.

A point is a number of calls and returns, of Python and of C functions, in all threads: how many a run gets through by
some time depends on the machine and on what else it does, which of them come when does not. The clock stops some runs
too, which then may be in the middle of such a call.

The runs are forks of one process that has imported everything and run once, so that a run takes only its own time. It
keeps to one thread: a fork has none of the others.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Settings:
    """How many runs get one of the signals ``numbers``, which take turns, each in a part of its own of what an
    undisturbed run does: ``before`` there is an output, while it is ``unfinished``, and ``after`` it is in place;
    ``edges``, where it appears and where it is put in place, call by call; ``timed``, at times of the clock.

    ``file_limits``, ``disk_sizes``: bytes that a file, or the file system mounted at ``disk``, may have in further
    runs. The working directory of a run is one of its own below ``root``, or ``disk``, which is emptied after it.
    """

    root: str
    arguments: list[str]
    numbers: list[int] = field(default_factory=list)
    before: int = 0
    unfinished: int = 0
    after: int = 0
    edges: int = 0
    timed: int = 0
    seed: int = 0
    file_limits: list[int] = field(default_factory=list)
    disk_sizes: list[int] = field(default_factory=list)
    disk: str = ""


@dataclass(frozen=True)
class Stopped:
    """``code``: exit code, or minus the signal that ended the run. ``left``: what the run left in ``directory``.
    ``part``: that of :class:`Settings`, in which it was stopped, by the signal ``number``."""

    code: int
    err: str
    directory: str
    left: list[str]
    part: str
    number: int


class Events:
    """Counts calls and returns in all threads, and sends this process a signal at one of them.

    ``changes``: how many there had been when the first directory was made, and when one was renamed.
    """

    def __init__(self, number: int = 0, at: int = -1) -> None:
        self.number, self.at = number, at
        self.changes: dict[object, int] = {}
        self._numbers = itertools.count()

    def __call__(self, frame: object, event: str, what: object) -> None:
        count = next(self._numbers)
        if count == self.at:
            os.kill(os.getpid(), self.number)
        elif event == "c_return" and what in (os.mkdir, os.rename):
            self.changes.setdefault(what, count)

    def start(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> int:
        """How many there were."""
        sys.setprofile(None)
        threading.setprofile(None)
        return next(self._numbers)


def run_settings(settings: Settings) -> list[Stopped]:
    """Starts this file as a program of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(asdict(settings)),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    return [Stopped(**found) for found in json.loads(done.stdout)]


def main() -> None:
    import torch

    from fastlora.cli import app as cli
    from fastlora.cli import exits

    settings = Settings(**json.load(sys.stdin))
    torch.set_num_threads(1)
    root = Path(settings.root)
    results, sys.stdout = sys.stdout, open(os.devnull, "w")
    sys.argv = ["fastlora", *settings.arguments]
    os.chdir(_made(root / "first"))
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    exits.outputs.clear()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    found = []
    draw = random.Random(settings.seed)
    numbers = settings.numbers
    if settings.before:
        counted = [_counted(cli, _made(root / f"whole-{i}")) for i in range(3)]
        started, placed, over = (int(statistics.median(column)) for column in zip(*counted, strict=True))
        for part, start, end in (("before", 0, started), ("unfinished", started, placed), ("after", placed, over)):
            count = getattr(settings, part)
            for i in range(count):
                at = start + int((i + draw.random()) / count * (end - start))
                found.append(_stopped(cli, _made(root / f"{part}-{i}"), part, numbers[i % len(numbers)], at=at))
        for i in range(settings.edges):
            at = (started, placed)[i % 2] + (i - settings.edges // 2) // 2
            number = numbers[i // 2 % len(numbers)]
            found.append(_stopped(cli, _made(root / f"edges-{i}"), "edges", number, at=at))
    seconds = [_timed(cli, _made(root / f"timed-whole-{i}")) for i in range(3 if settings.timed else 0)]
    for i in range(settings.timed):
        wait = (i + draw.random()) / settings.timed * statistics.median(seconds)
        found.append(_stopped(cli, _made(root / f"timed-{i}"), "timed", numbers[i % len(numbers)], wait=wait))
    for i, limit in enumerate(settings.file_limits):
        found.append(_stopped(cli, _made(root / f"limit-{i}"), "limit", limit=limit))
    for size in settings.disk_sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}", settings.disk], check=True)
        found.append(_stopped(cli, Path(settings.disk), "disk"))
        for entry in Path(settings.disk).iterdir():
            shutil.rmtree(entry)
    json.dump([asdict(f) for f in found], results)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _counted(cli: Any, directory: Path) -> list[int]:
    """Events of an undisturbed run until its unfinished output is there, until it is in place, and in all."""
    process, errors = _start(cli, directory, events=Events())
    with os.fdopen(errors) as pipe:
        counts = [int(word) for word in pipe.read().split()]
    _, status = os.waitpid(process, 0)
    assert status == 0 and len(counts) == 3 and counts == sorted(counts)
    return counts


def _timed(cli: Any, directory: Path) -> float:
    process, errors = _start(cli, directory)
    started = time.perf_counter()
    os.close(errors)
    _, status = os.waitpid(process, 0)
    assert status == 0
    return time.perf_counter() - started


def _stopped(
    cli: Any,
    directory: Path,
    part: str,
    number: int = 0,
    at: int | None = None,
    wait: float = 0.0,
    limit: int = 0,
) -> Stopped:
    """The signal comes at an event, or after so many seconds."""
    process, errors = _start(cli, directory, limit, None if at is None else Events(number, at))
    if number and at is None:
        time.sleep(wait)
        os.kill(process, number)  # a run that is over is not waited for yet, so this can only reach it
    with os.fdopen(errors) as pipe:
        err = pipe.read()
    _, status = os.waitpid(process, 0)
    left = sorted(entry.name for entry in directory.iterdir())
    return Stopped(os.waitstatus_to_exitcode(status), err, str(directory), left, part, number)


def _start(cli: Any, directory: Path, limit: int = 0, events: Events | None = None) -> tuple[int, int]:
    """Process and the reading end of its standard error, once the command has begun."""
    ready, begun = os.pipe()
    errors, standard_error = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(standard_error, 2)
        for end in (ready, errors, standard_error):
            os.close(end)
        os.chdir(directory)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        _become(cli, begun, events)
    os.close(begun)
    os.close(standard_error)
    os.read(ready, 1)
    os.close(ready)
    return process, errors


def _become(cli: Any, begun: int, events: Events | None) -> NoReturn:
    app, code = cli.app, 99

    def telling(**settings: Any) -> Any:
        os.write(begun, b"x")
        if events is not None:
            events.start()
        return app(**settings)

    cli.app = telling
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        if events is not None:
            last = events.stop()
            if events.at < 0:
                print(*events.changes.values(), last, file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
