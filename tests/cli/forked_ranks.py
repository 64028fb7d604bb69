"""``python forked_ranks.py``: ranks of commands, forked from a process that has imported all, since that takes seconds.

Reads cases from standard input, a line of JSON each, and answers with one: exit codes, what every rank said on standard
error, and the seconds until all had ended. As torchrun does, it stops the others when one has failed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STOPS_AFTER = 0.1  # seconds, as torchrun's agent looks
LAST = -1  # in place of the number of an exchange: when all is done but leaving


@dataclass
class Ended:
    """How the ranks of a command ended. ``seconds``: from the moment that one was killed, if one was."""

    codes: list[int]
    said: list[str]
    printed: list[str]
    exchanges: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def messages(self) -> list[str]:
        """What all of them said."""
        return [line for text in self.said for line in text.splitlines()]


class ForkedRanks:
    """The process that forks ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        *arguments: str | Path,
        cwd: list[Path],
        kill: tuple[int, int] | None = None,
        late: float = 0.0,
        apart: bool = False,
    ) -> Ended:
        """One command on ``len(cwd)`` ranks, each in its folder. ``kill``: a rank, and the exchange with the others
        before which it is killed, which their watch notices only ``late`` seconds after. ``apart``: as on machines of
        their own, others do not see what rank 0 writes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        case = {"arguments": list(map(str, arguments)), "cwd": list(map(str, cwd)), "kill": kill, "late": late}
        case["apart"] = apart
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(case: dict[str, Any], rank: int, port: int, folder: str) -> None:
    """A child: one rank."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(case["cwd"])),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.chdir(case["cwd"][rank])
    for number, name in ((1, "printed"), (2, "said")):
        os.dup2(os.open(f"{folder}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from fastlora.cli import app, exits, run
    from fastlora.runtime import joint_outputs, ranks

    if case["apart"] and rank:
        joint_outputs.is_there = lambda probe, token: False

    victim, at = case["kill"] or (-1, 0)
    exchange, leave, count = ranks.Ranks.exchange, exits.leave, 0
    run.end_all = lambda lost: (time.sleep(case["late"]), exits.end_all(lost))[1]

    def die() -> None:
        Path(folder, "killed").write_text(repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: ranks.Ranks, *given: Any, **named: Any) -> list[bytes]:
        nonlocal count
        if rank == victim and count == at:
            die()
        count += 1
        return exchange(self, *given, **named)

    def left(**given: Any) -> None:
        Path(folder, f"exchanges-{rank}").write_text(str(count))
        if rank == victim and at == LAST:
            die()
        leave(**given)

    ranks.Ranks.exchange, exits.leave = counted, left  # type: ignore[assignment, method-assign]
    sys.argv = ["fastlora", *case["arguments"]]
    app.main()


def _case(case: dict[str, Any]) -> Ended:
    count, port = len(case["cwd"]), _free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(count):
            child = os.fork()
            if not child:
                try:
                    _rank(case, rank, port, folder)
                except SystemExit as end:
                    sys.stdout.flush()
                    os._exit(end.code if isinstance(end.code, int) else 1)
                except BaseException:
                    import traceback

                    traceback.print_exc(file=sys.__stderr__)
                os._exit(1)
            children[child] = rank
        codes, failed = [0] * count, 0.0
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if status else 0.0)
                continue
            if failed and time.monotonic() - failed > STOPS_AFTER:
                for other in children:
                    os.kill(other, signal.SIGTERM)
                failed = time.monotonic() + 20.0
            time.sleep(0.005)
        ended = time.monotonic()

        def read(name: str) -> str:
            file = Path(folder, name)
            return file.read_text() if file.exists() else ""

        return Ended(
            codes,
            [read(f"said-{rank}") for rank in range(count)],
            [read(f"printed-{rank}") for rank in range(count)],
            [int(read(f"exchanges-{rank}") or 0) for rank in range(count)],
            ended - float(read("killed") or ended),
        )


def _serve() -> None:
    import fastlora as fl

    for name in fl.__all__:
        getattr(fl, name)
    import torch.distributed

    assert torch.distributed.is_available()
    for line in sys.stdin:
        print(json.dumps(vars(_case(json.loads(line)))), flush=True)


if __name__ == "__main__":
    _serve()
