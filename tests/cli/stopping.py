"""Runs a command many times, each stopped at a moment of its own. A program: settings on stdin, results on stdout.

The runs are forks of one process that has imported everything and run once, so that a run takes only its own time. It
keeps to one thread: a fork has none of the others.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Settings:
    """``moments``: how many runs get the signal ``number``, one in each of as many parts of an undisturbed run's time.
    ``writing``: as many again, from when the unfinished output is there.

    ``file_limits``, ``disk_sizes``: bytes that a file, or the file system mounted at ``disk``, may have in further
    runs. The working directory of a run is one of its own below ``root``, or ``disk``, which is emptied after it.
    """

    root: str
    arguments: list[str]
    number: int = 0
    moments: int = 0
    writing: int = 0
    seed: int = 0
    file_limits: list[int] = field(default_factory=list)
    disk_sizes: list[int] = field(default_factory=list)
    disk: str = ""


@dataclass(frozen=True)
class Stopped:
    """``code``: exit code, or minus the signal that ended the run. ``left``: what the run left in ``directory``."""

    code: int
    err: str
    directory: str
    left: list[str]


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
    for count, late in ((settings.moments, False), (settings.writing, True)):
        name = "late" if late else "any"
        times = [_timed(cli, _made(root / f"{name}-whole-{i}"), late) for i in range(5 if count else 0)]
        for i in range(count):
            wait = (i + draw.random()) / count * statistics.median(times)
            found.append(_stopped(cli, _made(root / f"{name}-{i}"), settings.number, wait, late))
    for i, limit in enumerate(settings.file_limits):
        found.append(_stopped(cli, _made(root / f"limit-{i}"), limit=limit))
    for size in settings.disk_sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}", settings.disk], check=True)
        found.append(_stopped(cli, Path(settings.disk)))
        for entry in Path(settings.disk).iterdir():
            shutil.rmtree(entry)
    json.dump([asdict(f) for f in found], results)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _timed(cli: Any, directory: Path, late: bool) -> float:
    process, _ = _start(cli, directory)
    started = time.perf_counter()
    if late:
        started = _await_output(process, directory)
    _, status = os.waitpid(process, 0)
    assert status == 0
    return time.perf_counter() - started


def _await_output(process: int, directory: Path) -> float:
    """When the unfinished output was seen, or the run was over."""
    over = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not os.listdir(directory) and os.waitid(os.P_PID, process, over) is None:
        time.sleep(0.0001)
    return time.perf_counter()


def _stopped(
    cli: Any, directory: Path, number: int = 0, wait: float = 0.0, late: bool = False, limit: int = 0
) -> Stopped:
    process, errors = _start(cli, directory, limit)
    started = time.perf_counter()
    if number:
        if late:
            started = _await_output(process, directory)
        time.sleep(max(0.0, started + wait - time.perf_counter()))
        os.kill(process, number)  # a run that is over is not waited for yet, so this can only reach it
    with os.fdopen(errors) as pipe:
        err = pipe.read()
    _, status = os.waitpid(process, 0)
    left = sorted(entry.name for entry in directory.iterdir())
    return Stopped(os.waitstatus_to_exitcode(status), err, str(directory), left)


def _start(cli: Any, directory: Path, limit: int = 0) -> tuple[int, int]:
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
        _become(cli, begun)
    os.close(begun)
    os.close(standard_error)
    os.read(ready, 1)
    os.close(ready)
    return process, errors


def _become(cli: Any, begun: int) -> NoReturn:
    app, code = cli.app, 99

    def telling(**settings: Any) -> Any:
        os.write(begun, b"x")
        return app(**settings)

    cli.app = telling
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
