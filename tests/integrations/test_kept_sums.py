"""Servers that are asked for sums of the same adapters with other weights."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, make_adapter

import fastlora as fl
from fastlora.integrations.serving import composer, kept_sums
from fastlora.integrations.serving.composer import Composer
from fastlora.integrations.serving.settings import Settings

BASE = "made-up/model"
SUM = "0.7*legal + 0.3*med"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "in" / "legal", rank=4, seed=1)
    make_adapter(tmp_path / "in" / "med", rank=3, seed=2, alpha=5, use_rslora=True)
    make_adapter(tmp_path / "in" / "law-2", rank={m: 2 + i for i, m in enumerate(MODULES)}, seed=3)
    return tmp_path / "in"


def answers(ours: Composer, *names: str) -> list[Path | None]:
    """All asked for at once."""

    async def ask() -> list[Path | None]:
        return await asyncio.gather(*(ours.answer(BASE, name) for name in names))

    return asyncio.run(ask())


def kept(ours: Composer) -> list[list[str]]:
    """The adapters of the sums that are kept, by name."""
    return [sorted(one.stamps) for one in ours._sums._sums.values()]


def files_of(path: Path | None) -> list[bytes]:
    assert path is not None
    return [file.read_bytes() for file in sorted(path.iterdir())]


def count_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a sum was begun, as the length of what is returned."""
    make, begun = composer.KeptSum.of, list[int]()

    def noted(*args: Any, **options: Any) -> Any:
        begun.append(1)
        return make(*args, **options)

    monkeypatch.setattr(composer.KeptSum, "of", noted)
    return begun


@pytest.mark.parametrize("most_rank", [8, 4])
def test_a_sum_with_other_weights_is_written_again_with_the_same_bits(
    folder: Path, most_rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = count_kept(monkeypatch)
    names = [SUM, "0.25*legal - med", "2*(legal + med/3)", "legal - 'law-2'", "0.1*legal + 0.3*'law-2'"]
    ours = Composer(Settings(folder, tmp_path / "one", max_rank=most_rank))
    again = [files_of(path) for path in answers(ours, *names)]
    assert len(begun) == 2 and len(ours._sums._sums) == 2
    for name, files in zip(names, again, strict=True):
        fresh = Composer(Settings(folder, tmp_path / f"one {len(begun)}", max_rank=most_rank))
        monkeypatch.setattr(fresh, "_written_again", lambda *_: None)
        assert files_of(answers(fresh, name)[0]) == files
        begun.append(1)


@pytest.mark.parametrize("how", ["replaced", "edited", "edited with the same time"])
def test_a_kept_sum_is_dropped_when_a_file_changes(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = count_kept(monkeypatch)
    ours = Composer(Settings(folder, tmp_path / "cache", max_rank=4))
    answers(ours, SUM, "0.5*legal + 0.5*med", "legal + 'law-2'")
    assert len(begun) == 2 and len(ours._sums._sums) == 2
    file = folder / "med" / "adapter_model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 0x80  # the sign of the last number
    if how == "replaced":
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(file)
    else:
        with file.open("r+b") as handle:
            handle.write(content)
    if how == "edited with the same time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    (path,) = answers(ours, "0.4*legal + 0.6*med")
    assert len(begun) == 3 and len(ours._sums._sums) == 2 and path is not None
    wanted = (0.4 * fl.load(folder / "legal") + 0.6 * fl.load(folder / "med")).compress(4)
    found = fl.load(path)
    for module in MODULES:
        assert torch.allclose(found.delta(module), wanted.delta(module), rtol=0, atol=1e-5)


def test_nothing_holds_the_files_of_an_adapter_that_was_replaced(folder: Path, tmp_path: Path) -> None:
    ours = Composer(Settings(folder, tmp_path / "cache", max_rank=8))
    for name in (SUM, "legal + 'law-2'"):
        answers(ours, name)
    make_adapter(folder / "med", rank=3, seed=9, alpha=5)
    assert None not in answers(ours, "2*med") and kept(ours) == [["law-2", "legal"]]


def test_few_sums_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_sums, "MOST_SUMS", 2)
    ours = Composer(Settings(folder, tmp_path / "cache", max_rank=8))
    for name in ("legal + med", "med + legal", "legal + 'law-2'", "2*med + legal"):
        answers(ours, name)
    assert kept(ours) == [["law-2", "legal"], ["legal", "med"]]
    monkeypatch.setattr(kept_sums, "MOST_BYTES", 1)
    assert None not in answers(ours, "3*med + legal", "4*med + legal") and not ours._sums._sums


def test_what_fails_with_a_kept_sum_is_begun_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = Composer(Settings(folder, tmp_path / "cache", max_rank=8))

    def full(*_: Any) -> None:
        raise OSError("no room")

    assert None not in answers(ours, SUM)
    with monkeypatch.context() as broken:
        broken.setattr(kept_sums.KeptSum, "write", full)
        assert answers(ours, "0.2*legal + med") == [None] and not ours._sums._sums
    assert None not in answers(ours, "0.2*legal + med") and len(ours._sums._sums) == 1


def test_a_sum_with_other_weights_than_were_read_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What later requests are computed from is the text, so it must say what was added up."""
    make, calls = composer.KeptSum.of, list[Any]()

    def noted(mix: Any, terms: Any, weights: Any, *others: Any, **options: Any) -> Any:
        calls.append([make(mix, terms, w, *others, **options) for w in (weights, {k: 0.5 for k in weights})])
        return None

    monkeypatch.setattr(composer.KeptSum, "of", noted)
    assert answers(Composer(Settings(folder, tmp_path / "one", max_rank=8)), SUM) != [None]
    ((read, other),) = calls
    assert read is not None and other is None
