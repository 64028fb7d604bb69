"""Files that are given back after use: what is mapped of them is no longer in memory, and is read again unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from builders import make_adapter

import fastlora as fl
from fastlora.analysis.all_pairs import all_pairs
from fastlora.core.updates import sources
from fastlora.runtime import memory

SMAPS = Path("/proc/self/smaps")


def mapped_kilobytes(directory: Path) -> int:
    """Of files below a directory, as the system counts what is in memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not tell what is in memory of a file")
def test_files_are_given_back_as_a_whole_where_memory_is_bounded(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / f"a{i}", {"layers.0.q": (4096, 64)}, rank=8, seed=i) for i in range(3)]
    pool = fl.Pool.load(paths)
    updates = [a.updates["layers.0.q"] for a in pool.adapters]
    before = [x.clone() for x in sources(updates)]
    memory.release_files(sources(updates))
    assert mapped_kilobytes(tmp_path) >= 3 * 128, "without a bound nothing is given back"
    with memory.giving_back():
        memory.release_files(sources(updates))
        assert mapped_kilobytes(tmp_path) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, sources(updates), strict=True))


def test_memory_of_tensors_is_never_given_back() -> None:
    own = torch.full((1 << 20,), 3.0)
    with memory.giving_back():
        memory.release_files([own])
        memory.release([own])
    assert bool((own == 3).all())


def test_another_bound_stays() -> None:
    with memory.bounded(2**30), memory.giving_back():
        assert memory.batch_bytes(2**40) < 2**30
    with memory.giving_back():
        assert memory.is_bounded() and memory.batch_bytes(2**34) == 2**34 < sys.maxsize
    assert not memory.is_bounded()


def test_similarities_have_the_same_bits(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / f"a{i:02d}", rank=1 + i % 3, seed=i) for i in range(34)]
    pool = fl.Pool.load(paths)
    plain = list(all_pairs(pool))
    with memory.giving_back():
        found = list(all_pairs(pool))
    for x, y in zip(plain, found, strict=True):
        assert torch.equal(x.inner, y.inner) and torch.equal(x.subspace, y.subspace)
