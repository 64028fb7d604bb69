"""Damages single files of every family and dialect, and holds what is read against a plain second reader.

    python tests/fuzz/single_files.py --count 20000 --seed 1 --json tests/fuzz/single_files.json

A case is a sound file of ``tests/dialects/files.py``, maybe with modules of LyCORIS, biases and magnitudes, and one or
two things that are wrong with it. It is a violation if it is read and a number differs from the second reader's, if a
module of it is missing in what was read, or if anything but an error of fastlora comes out. Cases run in a process with
bounds on time and memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1])]

import plain_reader  # noqa: E402
from command_line import main  # noqa: E402
from run import ADDRESS_SPACE, GROWTH, MULTIPLE, Violation, peak, resident, status  # noqa: E402
from single_files_cases import Case, make  # noqa: E402

import fastlora as fl  # noqa: E402
from fastlora.errors import FastloraError, NonFiniteError, UnsupportedAdapter  # noqa: E402

LIMIT_S = 120
CLOSE = 1e-6
"""Of the largest element: dense modules of LyCORIS are rounded to float32."""


def write(case: Case, folder: Path) -> Path:
    path = folder / f"style.{case.suffix}"
    tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in case.tensors.items()}
    if case.suffix == "bin":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save

        path.write_bytes(case.edit(save(tensors, case.metadata or None)))
    return path


def check(case: Case, folder: Path) -> str:
    """The outcome of a case. Raises :class:`Violation`."""
    path = write(case, folder)
    before, size = resident(), path.stat().st_size
    try:
        adapter = fl.load(path, family=case.family, rank=case.rank)
    except FastloraError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 2000 or (str(path) not in text and "family" not in text):
            raise Violation(f"an odd message: {text[:300]!r}") from None
        return {UnsupportedAdapter: "unsupported", NonFiniteError: "not finite"}.get(type(error), "refused")
    if peak() - before > GROWTH + MULTIPLE * size:
        raise Violation(f"{(peak() - before) >> 20} MiB of memory for {size} bytes")
    compare(case, adapter, path)
    return "read"


def compare(case: Case, adapter: fl.Adapter | fl.DoRA, path: Path) -> None:
    """Every module of the file, by what the file calls it."""
    form = adapter.base.form
    assert form is not None
    try:
        meant = plain_reader.read(path, {stem: module for module, stem in form.stems.items()})
    except plain_reader.Damaged as error:
        raise Violation(f"accepted, but the second reader says: {error}") from None
    found = {form.stems[module]: module for module in adapter.updates}
    for stem, delta in meant.items():
        module = found.get(stem)
        if module is None:
            others = [m for m in adapter.updates if close(dense(adapter, m), delta)]
            if not others:
                raise Violation(f"{stem} is lost")
            continue
        if case.modules.get(stem, module) != module and form.family == case.home:
            raise Violation(f"{stem} is {module} and not {case.modules[stem]}")
        if case.rank is not None and plain_reader.is_lycoris(path, stem):
            continue
        got = dense(adapter, module)
        if not close(got, delta) and not (len(delta) % 2 == 0 and close(torch.cat(got.chunk(2)[::-1]), delta)):
            raise Violation(f"{stem}: other numbers")
    extra = set(found) - set(meant)
    if extra:
        raise Violation(f"{sorted(extra)[0]} comes from nowhere")


def dense(adapter: fl.Adapter | fl.DoRA, module: str) -> Tensor:
    update = adapter.updates[module]
    left, right = update.B.stored, update.A.stored
    assert left is not None and right is not None
    return update.scaling * left.double() @ right.double()


def close(found: Tensor, meant: Tensor) -> bool:
    if found.shape != meant.shape:
        return False
    if not bool(meant.isfinite().all()):
        return True  # found when it is computed with
    return float((found - meant).abs().max()) <= CLOSE * float(meant.abs().max())


def one(seed: int, root: Path) -> tuple[int, str, str, str]:
    """``(seed, kind, outcome, violation or "")``."""
    case = make(seed)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        try:
            return seed, case.kind, check(case, Path(folder)), ""
        except Violation as error:
            return seed, case.kind, "violation", str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last))
            return seed, case.kind, "violation", f"{type(error).__name__}: {str(error)[:300]} ({where})"


def _work(connection: Connection, root: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bound = status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    while (seed := connection.recv()) is not None:
        connection.send(one(seed, root))


def run(seeds: range | list[int], root: Path) -> Iterator[tuple[int, str, str, str]]:
    """Every case, in a process that is replaced when it dies or hangs."""
    process, connection = None, None
    for seed in seeds:
        if process is None or connection is None:
            connection, other = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=_work, args=(other, root), daemon=True)
            process.start()
            other.close()
        try:
            connection.send(seed)
            if not connection.poll(LIMIT_S):
                raise TimeoutError
            yield connection.recv()
        except (EOFError, OSError) as error:
            how = "took too long" if isinstance(error, TimeoutError) else "the process died"
            process.kill()
            process = None
            yield seed, make(seed).kind, "violation", how
    if connection is not None and process is not None:
        connection.send(None)
        process.join(5)


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
