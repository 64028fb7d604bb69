"""Runs mutations against fastlora: load, decompose with a healthy adapter, save, compare. See :mod:`mutate`.

    python tests/fuzz/run.py --count 100000 --seed 1 --json tests/fuzz/result.json

Cases run in a worker process with a bound on its memory; a worker that dies or hangs is replaced and the case recorded.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import oracle
import torch
from cases import SHAPES, Case, healthy
from command_line import main
from mutate import mutation

import fastlora as fl
from fastlora.errors import FastloraError, NonFiniteError, OutputError, UnsupportedAdapter

LIMIT_S = 120.0
"""Seconds that a case may take."""
GROWTH = 64 << 20
"""Bytes of resident memory that a case may take beside :data:`MULTIPLE` times its files."""
MULTIPLE = 40
ADDRESS_SPACE = 4 << 30
"""Bytes of address space beyond what the worker has at its start."""


class Violation(Exception):
    """Something that must never happen."""


def prepare(root: Path) -> None:
    """The healthy partners, one of each template."""
    for template in SHAPES:
        healthy(template, 12345).write(root / "healthy" / template)


def check(case: Case, root: Path) -> str:
    """The outcome of one mutation. Raises :class:`Violation`."""
    directory, out = root / "case", root / "out"
    case.write(directory)
    size = sum(p.stat().st_size for p in directory.iterdir() if p.is_file() and not p.is_symlink())
    before = resident()
    try:
        outcome = attempt(case, directory, out, root / "healthy" / case.template)
        grown = peak() - before
        if size < 1 << 30 and grown > GROWTH + MULTIPLE * size:
            raise Violation(f"{grown >> 20} MiB of memory for {size} bytes of files")
        if list(root.glob("fastlora-fuzz-payload-*")) or list(Path.cwd().glob("fastlora-fuzz-payload-*")):
            raise Violation("a pickled call was made")
        return outcome
    finally:
        for path in (directory, out):
            shutil.rmtree(path, ignore_errors=True)


def attempt(case: Case, directory: Path, out: Path, partner: Path) -> str:
    try:
        adapter = fl.load(directory, "damaged")
        if case.must_refuse:
            raise Violation(f"accepted, although {case.about or 'it'} is damaged")
        expected = compare(case, adapter, directory)
        result = fl.decompose(fl.Pool([adapter, fl.load(partner, "healthy")]))
        result.save(out)
    except FastloraError as error:
        left = [p.name for p in out.parent.iterdir() if p.name not in ("case", "healthy")]
        if left:
            raise Violation(f"{', '.join(left)} was left by: {error}") from None
        judge_message(case, error, directory)
        kinds = {UnsupportedAdapter: "unsupported", NonFiniteError: "not finite", OutputError: "cannot be written"}
        return next((name for kind, name in kinds.items() if isinstance(error, kind)), "refused")
    compare_results(result, expected, out)
    return "accepted"


def judge_message(case: Case, error: FastloraError, directory: Path) -> None:
    text = str(error)
    if not text.isprintable() or len(text) > 2000:
        raise Violation(f"unprintable or long message ({len(text)}): {text[:300]!r}")
    places = (str(directory), str(directory.parent / "out"), "adapter '", "adapters '")
    if not any(p in text for p in places) and not isinstance(error, OutputError):
        raise Violation(f"does not say where: {text}")
    # A case that breaks one thing names it; where another thing was found first, that is named instead.
    if case.must_refuse and case.about and repr(case.about)[1:-1] not in text and "tensor" not in text:
        raise Violation(f"does not name {case.about!r}: {text}")


def compare(case: Case, adapter: fl.Adapter, directory: Path) -> dict[str, np.ndarray] | None:
    """Holds what was loaded against an independent reading of the same bytes."""
    if not case.numbers:
        return None
    try:
        expected = oracle.read(directory)
    except oracle.Damaged as error:
        raise Violation(f"accepted, but the second reader says: {error}") from None
    if set(expected) != set(adapter.modules):
        raise Violation(f"modules {sorted(adapter.modules)} instead of {sorted(expected)}")
    for module, dense in expected.items():
        update = adapter.updates[module]
        left, right = update.B.stored, update.A.stored
        assert left is not None and right is not None
        with np.errstate(all="ignore"):
            found = update.scaling * (left.double().numpy() @ right.double().numpy())
        close(found, dense, f"{module} as loaded", 1e-9)
    return expected


def close(found: np.ndarray, expected: np.ndarray, what: str, tolerance: float) -> None:
    with np.errstate(all="ignore"):
        scale = float(np.abs(expected).max())
        if not np.isfinite(scale):
            return  # the finite checks come later, in decompose
        difference = float(np.abs(found - expected).max())
    if found.shape != expected.shape or not difference <= tolerance * scale + 1e-300:
        raise Violation(f"{what}: off by {difference:.3g} of {scale:.3g}")


def compare_results(result: fl.Decomposition, expected: dict[str, np.ndarray] | None, out: Path) -> None:
    """``shared + unique`` is the adapter, and the saved unique part is the computed one."""
    shared, unique = result.shared_of("damaged"), result.unique_of("damaged")
    written = oracle.read(out / "unique" / "damaged")
    oracle.read(out / "shared"), oracle.read(out / "unique" / "healthy")
    for module, dense in (expected or {}).items():
        scale = float(np.abs(dense).max())
        if not 1e-15 < scale < 1e15:
            continue
        parts = [np.asarray(a.delta(module), dtype=np.float64) for a in (shared, unique)]
        close(parts[0] + parts[1], dense, f"shared + unique of {module}", 1e-4)
        saved = written.get(module)
        if saved is not None:
            precision = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(unique.dtype, 1e-4)
            difference = float(np.abs(saved - parts[1]).max())
            if not difference <= precision * max(scale, float(np.abs(parts[1]).max())) * 8:
                raise Violation(f"saved unique part of {module}: off by {difference:.3g} of {scale:.3g}")


def resident() -> int:
    """Resident bytes; also forgets the peak, so that :func:`peak` is that of one case."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0


def work(connection: Connection, root: Path) -> None:
    """The worker: takes seeds, answers with ``(seed, kind, outcome, violation or "")``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(root)
    bound = status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    while (seed := connection.recv()) is not None:
        connection.send(one(seed, root))
    gc.collect()


def one(seed: int, root: Path) -> tuple[int, str, str, str]:
    case = mutation(seed)
    try:
        return seed, case.kind, check(case, root), ""
    except Violation as error:
        return seed, case.kind, "violation", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
        return seed, case.kind, "violation", f"{type(error).__name__}: {str(error)[:300]} ({where})"


class Worker:
    """One worker process and the way to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.connection, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(other, root), daemon=True)
        self.process.start()
        other.close()
        self.has_died = False

    def run(self, seed: int) -> tuple[int, str, str, str] | None:
        """The answer for one seed; ``None`` when the worker died or did not answer in time."""
        try:
            self.connection.send(seed)
            if self.connection.poll(LIMIT_S):
                answer: tuple[int, str, str, str] = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self.has_died = True
        return None

    def end(self) -> str:
        if not self.has_died:
            self.process.kill()
        self.process.join()
        how = f"the process ended with {self.process.exitcode}" if self.has_died else "took too long"
        for left in self.root.iterdir():
            if left.name != "healthy":
                shutil.rmtree(left, ignore_errors=True)
        return how


def run(seeds: Iterable[int], root: Path) -> Iterator[tuple[int, str, str, str]]:
    """``(seed, kind, outcome, violation or "")`` of every seed, with a fresh worker after each that died."""
    prepare(root)
    worker = Worker(root)
    try:
        for seed in seeds:
            answer = worker.run(seed)
            if answer is None:
                how = worker.end()
                answer = seed, mutation(seed).kind, "violation", how
                worker = Worker(root)
            yield answer
    finally:
        worker.end()


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
