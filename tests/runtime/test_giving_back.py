"""Files that are given back after use: what is mapped of them is no longer in memory, and is read again unchanged."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from builders import make_adapter
from torch import Tensor

import fastlora as fl
from fastlora.core.updates import sources
from fastlora.runtime import memory, system

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


def loaded(directory: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The stored matrices of three adapters, and copies of them."""
    paths = [make_adapter(directory / f"a{i}", {"layers.0.q": (4096, 64)}, rank=8, seed=i) for i in range(3)]
    stored = sources(a.updates["layers.0.q"] for a in fl.Pool.load(paths).adapters)
    return stored, [x.clone() for x in stored]


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not tell what is in memory of a file")
def test_files_are_given_back_as_a_whole(tmp_path: Path) -> None:
    stored, copies = loaded(tmp_path)
    assert mapped_kilobytes(tmp_path) >= 3 * 128
    memory.MappedFiles(stored).give_back()
    assert mapped_kilobytes(tmp_path) == 0
    assert all(torch.equal(x, y) for x, y in zip(copies, stored, strict=True))


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not tell what is in memory of a file")
def test_what_was_written_into_a_mapped_tensor_stays(tmp_path: Path) -> None:
    """Of the file that one number was written to all pages stay, of the others none."""
    stored, copies = loaded(tmp_path)
    stored[2][-1, -1] = copies[2][-1, -1] = 7.0
    memory.MappedFiles(stored).give_back()
    assert 128 <= mapped_kilobytes(tmp_path) <= 160
    assert all(torch.equal(x, y) for x, y in zip(copies, stored, strict=True))


def test_nothing_is_given_back_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = loaded(tmp_path)
    given: list[object] = []
    monkeypatch.setattr(system, "advise", lambda *place: given.append(place))

    def closed(*_: object) -> int:
        raise PermissionError

    files = memory.MappedFiles(stored)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", closed)
        files.give_back()
    assert not given


def test_memory_of_tensors_is_never_given_back() -> None:
    own = torch.full((1 << 20,), 3.0)
    memory.MappedFiles([own]).give_back()
    with memory.bounded(2**30):
        memory.MappedFiles([own]).give_back()
        memory.release([own])
    assert bool((own == 3).all())


def test_similarities_have_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [make_adapter(tmp_path / f"a{i:02d}", rank=1 + i % 3, seed=i) for i in range(34)]
    pool = fl.Pool.load(paths)
    plain = fl.overlap(pool)
    overlap = importlib.import_module("fastlora.analysis.overlap")
    monkeypatch.setattr(overlap, "MAPPED_BYTES", 0)
    monkeypatch.setattr(overlap, "RESULTS_BYTES", 0)
    count = []
    give_back = memory.MappedFiles.give_back
    monkeypatch.setattr(memory.MappedFiles, "give_back", lambda self: (count.append(1), give_back(self)))
    found = fl.overlap(pool)
    assert len(count) == len(pool.modules)
    assert torch.equal(plain.cosine, found.cosine) and torch.equal(plain.subspace, found.subspace)
