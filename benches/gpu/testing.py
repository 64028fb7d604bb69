"""Stages that run tests: the suite, and every kernel under compute-sanitizer."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from benches.gpu.processes import ROOT, Clock, Command, Failed, Skipped, TookTooLong, last_line, tool

if TYPE_CHECKING:
    from benches.gpu.running import Visit

OPS = (
    "eigh", "svd", "chain", "gram", "combine", "merge_tiles", "similarity", "add_products", "tucker",
    "difference_products",
)  # fmt: skip
FOLDERS = ("on_gpu", "emulated", "triton")
SANITIZED = "tests/on_gpu/sanitized.py"
HUNG = 60  # seconds after which a test says where it is


def tests(visit: Visit, limit: float) -> str:
    """Those that are for a device, then the ops' own tests with every tensor on the device."""
    clock = Clock(limit)
    base = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benches.gpu.failing", "--maxfail=20"]
    base += ["-o", f"faulthandler_timeout={HUNG}", "-W", "ignore::DeprecationWarning"]
    parallel = [] if "xdist" in visit.report.facts["missing"] else ["-n", str(workers()), "--dist", "worksteal"]
    folders = [f"tests/{f}" for f in FOLDERS if (ROOT / "tests" / f).is_dir()]
    ops = [path for op in OPS if (ROOT / (path := f"tests/ops/test_{op}.py")).is_file()]
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    on_device = environment | {"FASTLORA_TEST_DEVICE": "cuda"}
    said: list[str] = []
    again: Command | None = None
    runs = [
        ("device", ["-m", "gpu", *folders], environment, 0.6),
        ("ops", ["-k", "not instruction_set", *ops], on_device, 1.0),
    ]
    if visit.tiny:  # what CI runs in an emulator and an interpreter anyway
        runs.pop()
        said.append("ops: left out")
    for what, chosen, variables, share in runs:
        failing = visit.folder / "failing.txt"
        failing.unlink(missing_ok=True)
        command = visit.shell.python_command(*base, *parallel, *chosen, FASTLORA_FAILING=str(failing), **variables)
        try:
            said.append(f"{what}: {_counts(visit.shell.run(command, share * clock.left))}")
        except Failed as failure:
            names = _failing(failing)
            if again is None and names:
                again = visit.shell.python_command(*base, "-x", names[0], **variables)
            found = f"{len(names)} failed, the first: {names[0]}" if names else "no test failed"
            said.append(f"{what}: {failure}; {found}")
            again = again or failure.again
    if again is not None:
        raise Failed("; ".join(said), again=again)
    return "; ".join(said)


def workers() -> int:
    """Processes for the tests: two cores each, of which the host's part needs no more."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def _failing(path: os.PathLike[str]) -> list[str]:
    """Tests that failed, as they did, also where the run was stopped."""
    try:
        with open(path, encoding="utf-8") as file:
            return list(dict.fromkeys(line.rstrip("\n") for line in file if line.strip()))
    except FileNotFoundError:
        return []


def _counts(output: str) -> str:
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)", last_line(output))
    return ", ".join(found)


def memcheck(visit: Visit, limit: float) -> str:
    """Every kernel once, on shapes that reach every form; every tensor in memory of its own, with guarded ends."""
    return _sanitized(visit, "memcheck", limit)


def racecheck(visit: Visit, limit: float) -> str:
    """The same for two threads that meet in shared memory."""
    return _sanitized(visit, "racecheck", limit)


def sanitizer(command: Command, check: str) -> Command:
    """A command under compute-sanitizer. Raises :class:`Skipped` where there is none."""
    program = tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer was not found")
    options = ("--tool", check, "--error-exitcode", "9", "--print-limit", "20")
    return command.under(program, *options, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _sanitized(visit: Visit, check: str, limit: float) -> str:
    script = visit.shell.python_command(SANITIZED, *(["--quick"] if visit.tiny else []))
    try:
        output = visit.shell.run(sanitizer(script, check), limit)
    except TookTooLong as late:
        raise Skipped(f"{late}, after: {last_line(late.output)}") from None
    except Failed as failure:
        if "Device not supported" in failure.output:
            raise Skipped("this device cannot be instrumented here") from None
        raise Failed(str(failure), failure.output) from None  # it is the smallest that there is
    return last_line(output)
