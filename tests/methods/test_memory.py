"""A bound on memory: it holds, and the results have the same bits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.adapter import Adapter, Factor, Update
from fastlora.errors import InputError
from fastlora.memory import parse

MODULES, WIDTH, RANK, ADAPTERS = 60, 4096, 16, 4  # 31 MB an adapter in each direction: 126 MB in, 150 MB out

ROOM = 64 * 2**20  # above what the process holds before it starts: less than inputs or results alone

SCRIPT = """
import sys, resource
import torch
import fastlora as fl
pool = fl.Pool.load(sys.argv[3:])
fl.ops.eigh(torch.eye(2))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
room = int(sys.argv[2])
bound = peak() + room if room else None
fl.decompose(pool, threshold=0.5, memory=bound).save(sys.argv[1])
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


def run(adapters: list[Path], out: Path, room: int) -> tuple[str, str]:
    """Whether the peak of resident memory kept to a bound, and a digest of every result."""
    command = [sys.executable, "-c", SCRIPT, str(out), str(room), *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        data = file.read_bytes()
        digest.update(data[8 + int.from_bytes(data[:8], "little") :])
    return done.stdout.strip(), digest.hexdigest()


def test_bounded_runs_keep_to_it_and_give_the_same_bits(adapters: list[Path], tmp_path: Path) -> None:
    _, bits = run(adapters, tmp_path / "free", 0)
    kept, same_bits = run(adapters, tmp_path / "bounded", ROOM)
    assert same_bits == bits
    assert kept == "True"
