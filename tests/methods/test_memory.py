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

SCRIPT = """
import resource, sys
import fastlora as fl
pool = fl.Pool.load(sys.argv[3:])
fl.ops.eigh(__import__("torch").eye(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fl.decompose(pool, threshold=0.5, memory=sys.argv[2] or None).save(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
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


def growth_and_bits(adapters: list[Path], out: Path, memory: str) -> tuple[int, str]:
    """Bytes by which the peak of resident memory grew, and a digest of every result."""
    command = [sys.executable, "-c", SCRIPT, str(out), memory, *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        data = file.read_bytes()
        digest.update(data[8 + int.from_bytes(data[:8], "little") :])
    return int(done.stdout) * 1024, digest.hexdigest()


def test_bounded_runs_give_the_same_bits_in_less_memory(adapters: list[Path], tmp_path: Path) -> None:
    free, bits = growth_and_bits(adapters, tmp_path / "free", "")
    bounded, same_bits = growth_and_bits(adapters, tmp_path / "bounded", "300MiB")
    assert same_bits == bits
    assert free > 126 * 10**6, "the unbounded run holds at least all of its input"
    assert bounded < 0.6 * free
