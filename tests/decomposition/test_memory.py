"""A bound on memory: it holds, and the results have the same bits."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from compiled import COMPILED, ON_HOST
from tolerances import FLOAT32, SUBSPACE64

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.errors import InputError
from fastlora.ops.dispatch import Kernel
from fastlora.ops.passes import GramAsked, GramJob
from fastlora.runtime.memory import parse

MODULES, WIDTH, RANK, ADAPTERS = 60, 4096, 16, 4  # 31 MB an adapter in each direction: 126 MB in, 150 MB out

ROOM = 64 * 2**20  # above what the process holds before it starts: less than inputs or results alone

BYTES_KEPT = 4096  # of the coefficients that one module of one pair leaves

SCRIPT = """
import sys
from pathlib import Path
import torch
import fastlora as fl
pool = fl.Pool.load(sys.argv[3:])
for adapter in pool.adapters:  # tensors are made, and their first pages read, when somebody looks: here
    for update in adapter.updates.values():
        update.B.stored[:1] @ update.A.stored[:, :64]
fl.ops.eigh(torch.eye(2))
def peak():  # ru_maxrss would count what the parent held before the child became this program
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
room = int(sys.argv[2])
bound = peak() + room if room else None
parts = fl.decompose(pool, threshold=0.5, memory=bound, mode=MODE)
if SAVE:
    parts.save(sys.argv[1])
print(peak() <= bound if room else None)
"""


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("512 MB", 2**29), ("1.5g", 3 * 2**29), (1024, 1024), ("100", 100), (None, None)],
)
def test_sizes(text: str | int | None, size: int | None) -> None:
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "1 PiB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="memory="):
        parse(text)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pool")
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(WIDTH, 2, generator=generator)
    for i in range(ADAPTERS):
        updates = {}
        for m in range(MODULES):
            B = torch.randn(WIDTH, RANK, generator=generator)
            B[:, :2] = 20 * common
            A = torch.randn(RANK, WIDTH, generator=generator)
            updates[f"layers.{m}.dense"] = Update(Factor.of("B", B), Factor.of("A", A))
        Adapter(f"a{i}", updates).save(root / f"a{i}")
    return sorted(root.iterdir())


def run(
    adapters: list[Path], out: Path, room: int, mode: str = "pool", save: bool = True, script: str = SCRIPT
) -> tuple[str, str]:
    """Whether the peak of resident memory kept to a bound, and a digest of every result."""
    script = f"MODE, SAVE = {mode!r}, {save}\n{script}"
    command = [sys.executable, "-c", script, str(out), str(room), *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        data = file.read_bytes()
        digest.update(data[8 + int.from_bytes(data[:8], "little") :])
    shutil.rmtree(out, ignore_errors=True)
    return done.stdout.strip(), digest.hexdigest()


def test_bounded_runs_keep_to_it_and_give_the_same_bits(adapters: list[Path], tmp_path: Path) -> None:
    _, bits = run(adapters, tmp_path / "free", 0)
    kept, same_bits = run(adapters, tmp_path / "bounded", ROOM)
    assert same_bits == bits
    assert kept == "True"


def small_pool(root: Path, count: int, modules: int, width: int) -> list[Path]:
    """Adapters that share a direction in every module."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(width, generator=generator)
    for i in range(count):
        updates = {}
        for m in range(modules):
            B, A = (torch.randn(shape, generator=generator) for shape in ((width, RANK), (RANK, width)))
            B[:, 0] = 20 * common
            updates[f"layers.{m}.dense"] = Update(Factor.of("B", B), Factor.of("A", A))
        Adapter(f"a{i:02}", updates).save(root / f"a{i:02}")
    return sorted(root.iterdir())


def test_all_pairs_of_64_adapters_from_one_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = importlib.import_module(f"fastlora.backends.{ON_HOST[0]}")
    kernel, reads = backend.KERNELS["gram_pass"], Counter[int]()

    def counting(jobs: list[GramJob]) -> None:
        reads.update(x.data_ptr() for job in jobs for x in job.factors)
        kernel.launch(jobs)

    monkeypatch.setitem(backend.KERNELS, "gram_pass", Kernel(counting, kernel.supports))
    if "gram_factors" in backend.KERNELS:
        whole = backend.KERNELS["gram_factors"]

        def counting_factors(asked: list[GramAsked]) -> bool:
            computed: bool = whole.launch(asked)
            stored = [f.stored for modules, *_ in asked for factors in modules for f in factors]
            reads.update(x.data_ptr() for x in stored if computed and x is not None)
            return computed

        monkeypatch.setitem(backend.KERNELS, "gram_factors", Kernel(counting_factors, whole.supports))
    pool = fl.Pool.load(small_pool(tmp_path, 64, 2, 96))
    parts = fl.decompose(pool, threshold=0.5, mode="pairs", memory="1MiB")
    assert len(parts.pairs) == 2016
    assert len(reads) == 64 * 2 * 2 and set(reads.values()) == {1}
    for a, b in (("a00", "a01"), ("a07", "a63"), ("a62", "a63")):
        alone = fl.decompose(pool.subset([a, b]), threshold=0.5)
        for module in pool.modules:
            same(parts.pairs[a, b].spectrum[module], alone.spectrum[module])
            for name in (a, b):
                one, two = (found.unique_of(name).delta(module) for found in (parts.pairs[a, b], alone))
                same(one, two)


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    """The same bits; of plain torch, whose bits depend on the batch, the same numbers."""
    if COMPILED:
        assert torch.equal(one, two)
    else:
        torch.testing.assert_close(one, two, rtol=0, atol=SUBSPACE64 if one.is_complex() else FLOAT32)


def test_all_pairs_of_64_adapters_within_a_bound(tmp_path: Path) -> None:
    """Their blocks alone, 8 MiB for every module, are more than the bound leaves room for."""
    adapters = small_pool(tmp_path / "in", 64, 8, 512)
    kept, _ = run(adapters, tmp_path / "out", ROOM + 8 * 2016 * BYTES_KEPT, "pairs", save=False)
    assert kept == "True"


def test_all_pairs_are_written_within_a_bound(tmp_path: Path) -> None:
    """The results of one module alone, of all pairs, are more than the bound leaves room for."""
    adapters = small_pool(tmp_path / "in", 16, 2, 4096)
    _, bits = run(adapters, tmp_path / "free", 0, "pairs")
    kept, same_bits = run(adapters, tmp_path / "bounded", ROOM, "pairs")
    assert same_bits == bits
    assert kept == "True"


VERBS = {
    "svd": "fl.merge(pool, memory=bound)",
    "cat": "fl.merge(pool, method='cat', memory=bound)",
    "pem": "fl.merge(pool, method='pem', memory=bound)",
    "tsv": "fl.merge(pool, method='tsv', memory=bound)",
    "compress": "fl.compress(pool['a0'] + pool['a1'] - pool['a2'], rank=4, memory=bound)",
    "columns": "fl.modulate(pool['a0'], fl.dipm.reverse(0.5), rank=4, memory=bound)",
    "components": "fl.modulate(pool['a0'], fl.dipm.reverse(0.5), granularity='component', memory=bound)",
}

SCRIPT_OF_VERBS = """
from fastlora.runtime.memory import bounded
result = VERB
with bounded(bound):
    result.save(sys.argv[1])
print(peak() <= bound if room else None)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_other_verbs_keep_to_a_bound_and_give_the_same_bits(verb: str, adapters: list[Path], tmp_path: Path) -> None:
    script = SCRIPT.partition("parts = ")[0] + SCRIPT_OF_VERBS.replace("VERB", VERBS[verb])
    _, bits = run(adapters, tmp_path / "free", 0, script=script)
    kept, same_bits = run(adapters, tmp_path / "bounded", ROOM, script=script)
    assert same_bits == bits
    assert kept == "True"
