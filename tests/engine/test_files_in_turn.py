"""Many adapters are written together, some files open at a time and those that are alike from one another: byte for
byte what each is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import MODULES, gaussian, make_factors

from fastlora import formats
from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, Extra, Selection
from fastlora.core.updates import with_rank_zero
from fastlora.engine import write
from fastlora.files.tensor_writing import TensorFile

FIRST, SECOND = list(MODULES)[:2]


def adapter(name: str, seed: int, rank: int = 4) -> Adapter:
    return Adapter.from_tensors(make_factors(rank=rank, seed=seed), name=name, base="made-up/model")


def adapters() -> list[Adapter]:
    """Some that are alike, and others that differ from these in one thing."""
    alike = [adapter(f"a{i}", i) for i in range(5)]
    without = [
        replace(a, name=f"without {m}", updates={**a.updates, m: with_rank_zero(a.updates[m])})
        for a, m in zip(alike, (FIRST, SECOND), strict=False)
    ]
    fewer = replace(alike[0], name="fewer", updates={m: u for m, u in alike[0].updates.items() if m != FIRST})
    chosen = BaseInfo(model="made-up/model", selection=Selection(("q_proj", "v_proj", "up_proj")))
    return [
        *alike, *without, fewer, adapter("wide", 7, rank=5),
        replace(alike[1], name="other base", base=BaseInfo(model="other/model")),
        replace(alike[2], name="chosen", base=chosen),
        replace(without[0], name="chosen without", base=chosen),
        replace(fewer, name="chosen fewer", base=chosen),
        replace(alike[3], name="half", dtype=torch.float16),
        *(replace(alike[i], name=f"head {i}", extras={"score.weight": Extra("value", gaussian(2, 3, seed=i))})
          for i in range(2)),
        replace(alike[4], name="nothing", updates={m: with_rank_zero(u) for m, u in alike[4].updates.items()}),
        adapter("a5", 5),
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(name="alone", scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    for record in adapters():
        formats.write_adapters({folder / record.name: record})
    return contents(folder)


@pytest.mark.parametrize(("most", "each"), [(2**27, 1), (1, 4)], ids=["small files", "large files"])
def test_bytes(most: int, each: int, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are opened once each where all their modules fit into memory together, else once a module."""
    monkeypatch.setattr(write, "OPEN_FILES", 3)
    monkeypatch.setattr(write, "WRITE_BYTES", most)
    opened: Counter[str] = Counter()
    plain = TensorFile.open

    @contextmanager
    def counted(self: TensorFile) -> Iterator[int]:
        opened[self.path.parent.name] += 1
        with plain(self) as file:
            yield file

    monkeypatch.setattr(TensorFile, "open", counted)
    formats.write_adapters({tmp_path / record.name: record for record in adapters()})
    assert contents(tmp_path) == alone
    assert opened["a0"] == each
