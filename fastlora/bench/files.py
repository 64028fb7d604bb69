"""From files to files: against copying them, and within a bound on memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.bench import answers
from fastlora.bench.contest import OURS, Contest, Task, require
from fastlora.bench.passes import CHECKED, TAU
from fastlora.bench.timing import ROUNDS, Contender, Seconds, thread_counts
from fastlora.bench.workloads import REAL, find, real_adapters, write_pool
from fastlora.engine.materialise import materialise

WRITTEN = "shutil.copyfile of as many bytes as are written"
READ = "shutil.copyfile of the files that are read"
UNBOUNDED = "without a bound"
BOUND = "1GiB"
ALLOWED = 2 * 2**30  # resident bytes: the bound on what is worked on, and Python with torch
MANY_BYTES = 2**30  # of factors: fewer rounds from here on
FEW_ROUNDS = 3
PER_BYTE = "llama2-7b-8x16"  # what the time per byte of the others is compared with


def inputs_of(workload: str, folder: Path) -> list[Path]:
    """The directories of a workload's adapters; those that are not the trained ones are written into ``folder``."""
    return real_adapters() if workload == REAL else write_pool(find(workload), folder)


def size_of(paths: Sequence[Path]) -> int:
    """Bytes of tensors below some directories."""
    return sum(f.stat().st_size for p in paths for f in p.rglob("*.safetensors"))


def clear(path: Path) -> None:
    """Deletes a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def files(workload: str) -> list[Contest]:
    """The contest from files to files against copies of what is written and of what is read."""
    what = f"load → decompose → save, {workload}, warm cache"
    return [Contest(what, (WRITTEN, READ), partial(_prepare_files, workload))]


def _prepare_files(workload: str) -> Task:
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    inputs = inputs_of(workload, root / "in")

    def ours() -> None:
        fl.decompose(fl.Pool.load(inputs), threshold=TAU).save(root / "out")

    def copy(sources: Sequence[Path]) -> None:
        for i, source in enumerate(sources):
            shutil.copyfile(source, root / "copy" / str(i))

    def empty_copy() -> None:
        clear(root / "copy")
        (root / "copy").mkdir()

    ours()
    _require_outputs(inputs, root / "out")
    shutil.copytree(root / "out", root / "results")
    tensors = {
        WRITTEN: sorted((root / "results").rglob("*.safetensors")),
        READ: [f for p in inputs for f in p.glob("*.safetensors")],
    }
    contenders = {OURS: Contender(ours, thread_counts(), reset=partial(clear, root / "out"))}
    contenders |= {name: Contender(partial(copy, copied), reset=empty_copy) for name, copied in tensors.items()}
    read, written = size_of(inputs), size_of([root / "results"])
    note = f"{workload}: {read / 1e6:.0f} MB read, {written / 1e6:.0f} MB written"
    return Task(contenders, read + written, note=note, close=folder.cleanup)


def _require_outputs(inputs: Sequence[Path], out: Path) -> None:
    """The unique parts that were written, in the first modules."""
    pool = Pool.load(inputs)
    pool = Pool((_head(a) for a in pool.adapters), align=False)
    tolerance = 1e-4 if pool.adapters[0].dtype == torch.float32 else 2e-2
    expected = answers.unique_parts(pool, TAU)
    for i, name in enumerate(pool.names):
        written = fl.load(out / "unique" / name)
        assert isinstance(written, fl.Adapter)
        for module, unique in zip(pool.modules, expected, strict=True):
            ((got, _),) = materialise([written.updates[module].baked()], torch.float32)
            require("unique B", got, pool[name].updates[module].scaling * unique[i].float(), tolerance)


def _head(adapter: fl.Adapter) -> fl.Adapter:
    updates = dict(list(adapter.updates.items())[:CHECKED])
    return fl.Adapter(adapter.name, updates, base=adapter.base, dtype=adapter.dtype)


def memory(workload: str) -> list[Contest]:
    """The contest from files to files under a bound on memory against the same without it."""
    what = f"load → decompose → save, {workload}, memory={BOUND}"
    opponent = f"{PER_BYTE} {UNBOUNDED}, time per byte" if workload != PER_BYTE else f"{UNBOUNDED}"
    return [Contest(what, (opponent,), partial(_prepare_memory, what, workload, opponent))]


def _prepare_memory(what: str, workload: str, opponent: str) -> Task:
    """Both in processes of their own, whose peaks of resident memory are their own; start and imports not timed."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    inputs = inputs_of(workload, root / "in")
    others = inputs if workload == PER_BYTE else inputs_of(PER_BYTE, root / "other")
    bounded, unbounded = root / "bounded", root / "unbounded"
    _, peak = in_child(inputs, bounded, BOUND)
    _, free_peak = in_child(inputs, unbounded, None)
    if digest(bounded) != digest(unbounded):
        raise AssertionError("the bound on memory changed the bits of the result")
    if peak > ALLOWED:
        raise AssertionError(f"memory={BOUND}: {peak} bytes were resident")
    read, written = size_of(inputs), size_of([bounded])
    clear(unbounded)
    scale = read / size_of(others)
    rounds = FEW_ROUNDS if read > MANY_BYTES else ROUNDS
    most = thread_counts()[-1:]
    contenders = {
        OURS: Contender(lambda: in_child(inputs, bounded, BOUND)[0], most, rounds, partial(clear, bounded)),
        opponent: Contender(
            lambda: Seconds(scale * in_child(others, unbounded, None)[0]), most, rounds, partial(clear, unbounded)
        ),
    }
    note = (
        f"{what}: {read / 1e6:.0f} MB read, {written / 1e6:.0f} MB written; {rounds} rounds; at most "
        f"{peak / 2**20:.0f} MiB resident, {free_peak / 2**20:.0f} MiB without the bound; the same bits"
    )
    return Task(contenders, read + written, note=note, close=folder.cleanup)


CHILD = """
import json, sys, time
import torch
import fastlora as fl
from fastlora.bench.files import peak_memory
settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
fl.ops.eigh(torch.eye(2))
start = time.perf_counter()
parts = fl.decompose(fl.Pool.load(settings["inputs"]), threshold=settings["threshold"], memory=settings["memory"])
parts.save(settings["out"])
print(json.dumps([time.perf_counter() - start, peak_memory()]))
"""


def in_child(inputs: Sequence[Path], out: Path, memory: str | None) -> tuple[Seconds, int]:
    """Seconds and peak of resident bytes of one decomposition in a process of its own."""
    settings = {
        "inputs": [str(p) for p in inputs],
        "out": str(out),
        "memory": memory,
        "threshold": TAU,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(settings)], stdout=subprocess.PIPE, check=True)
    seconds, peak = json.loads(done.stdout)
    return Seconds(seconds), peak


def peak_memory() -> int:
    """Most bytes that were resident in this process since it became this program.

    ``ru_maxrss`` would count the parent's pages too, from before the child turned into another program.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def digest(directory: Path) -> str:
    """Of every tensor file below a directory, with its place."""
    hashed = hashlib.sha256()
    for file in sorted(directory.rglob("*.safetensors")):
        hashed.update(str(file.relative_to(directory)).encode())
        with file.open("rb") as raw:
            hashed.update(hashlib.file_digest(raw, "sha256").digest())
    return hashed.hexdigest()
