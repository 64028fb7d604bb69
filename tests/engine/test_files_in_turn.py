"""Many adapters are written together, some files open at a time and those that are alike from one another: byte for
byte what each is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, gaussian, make_factors

from fastlora import formats
from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, Extra, Selection
from fastlora.core.updates import with_rank_zero
from fastlora.engine import write
from fastlora.errors import InputError, OutputError
from fastlora.files.tensor_writing import TensorFile
from fastlora.formats.peft.writing import AdapterFile

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


def test_files_are_closed_when_others_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are whole, and closed, before the last are opened; a failure leaves none open."""
    monkeypatch.setattr(write, "OPEN_FILES", 1)
    records = [adapter(f"a{i}", i) for i in range(8)]
    is_open, whole = set[str](), list[int]()
    plain = TensorFile.open

    @contextmanager
    def noted(self: TensorFile) -> Iterator[int]:
        whole.append(len(list(tmp_path.rglob("adapter_config.json"))))
        with plain(self) as file:
            is_open.add(self.path.parent.name)
            assert len(is_open) <= write.PREPARED + 1
            yield file
        is_open.remove(self.path.parent.name)

    monkeypatch.setattr(TensorFile, "open", noted)
    formats.write_adapters({tmp_path / "all" / record.name: record for record in records})
    assert whole == [0, 0, 0, 1, 2, 3, 4, 5] and not is_open

    def failing(self: write.WriteBatch) -> None:
        raise OutputError("no")

    monkeypatch.setattr(write.WriteBatch, "write", failing)
    with pytest.raises(OutputError, match="no"):
        formats.write_adapters({tmp_path / "failed" / record.name: record for record in records})
    assert not is_open and not list((tmp_path / "failed").rglob("adapter_config.json"))


def test_what_is_zero_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has zeros of rank 1 in its first module, computed beside the others; all such are made from one another."""
    made = Counter[str]()
    plain = AdapterFile.__init__

    def counted(self: AdapterFile, directory: Path, *others: Any) -> None:
        made[directory.name] += 1
        plain(self, directory, *others)

    monkeypatch.setattr(AdapterFile, "__init__", counted)
    whole = [adapter(f"a{i}", i) for i in range(3)]
    zero = [replace(a, name=f"z{i}", updates={m: with_rank_zero(u) for m, u in a.updates.items()})
            for i, a in enumerate(whole)]  # fmt: skip
    formats.write_adapters({tmp_path / record.name: record for record in [*whole, *zero]})
    assert made == {"a0": 1, "z0": 1}
    for record in zero:
        read = load(tmp_path / record.name)
        assert [(m, u.rank, float(u.B.stored.abs().max())) for m, u in read.updates.items()] == [(FIRST, 1, 0.0)]
    with pytest.raises(InputError, match="no modules, so there is nothing to write"):
        formats.write_adapters({tmp_path / "none": replace(whole[0], updates={})})
