"""Small adapters that are written whole: the same files as piece by piece, and the same answers where that fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from builders import gaussian, make_factors

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.backends import cpu
from fastlora.core.data import Extra
from fastlora.core.file_form import FileForm
from fastlora.engine import stream
from fastlora.errors import FastloraError, InputError, OutputError
from fastlora.files import spare, whole_output
from fastlora.formats import peft
from fastlora.formats.peft import whole
from fastlora.runtime import ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    whole._known.clear()
    yield
    whole._known.clear()


def made(dtype: torch.dtype = torch.float32, scaling: float = 1.0, **fields: Any) -> Adapter:
    """With both kinds of zero, and the smallest numbers."""
    factors = {}
    for module, (B, A) in make_factors(dtype=dtype).items():
        B[0, 0], B[0, 1], A[0, 0] = 0.0, -0.0, -0.0
        B[1, 0], A[0, 1] = torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal
        factors[module] = B, A, scaling
    return replace(Adapter.from_tensors(factors, name="x_[y]* z", base="org/model"), **fields)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Of every file the bytes and the permissions."""
    return {f.name: (f.read_bytes(), stat.S_IMODE(f.stat().st_mode)) for f in folder.iterdir()}


def in_pieces(adapter: Adapter, path: Path, **options: Any) -> Path:
    """Saves without the way that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "whole_files", lambda *_: None)
        return adapter.save(path, **options)


def summed() -> Adapter:
    """As stored matrices are after arithmetic that changes none of them."""
    return made() * 1.0


def embedded() -> Adapter:
    tensors = {"embed_tokens": (gaussian(16, 3, seed=1), gaussian(3, 90, seed=2)), **make_factors()}
    return Adapter.from_tensors(tensors, embeddings=["embed_tokens"])


def mixed() -> Adapter:
    (first, (B, A)), *others = make_factors().items()
    return Adapter.from_tensors({first: (B.bfloat16(), A.bfloat16()), **dict(others)})


def ragged(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name.format(i): (gaussian(8, i + 1, seed=i), gaussian(i + 1, 6, seed=i)) for i in range(2)}


WHOLE: dict[str, Callable[[], Adapter]] = {
    **{f"{dtype}"[6:]: lambda dtype=dtype: made(dtype) for dtype in DTYPES},
    "scaled": lambda: made(scaling=-4.0),
    "scaled bfloat16": lambda: made(torch.bfloat16, 0.125),
    "notes": lambda: made(notes=("It says <b>this</b>.",)),
    "provenance": lambda: made(provenance={"merge": "sum", "of": [{"weight": 0.5, "of": {"adapter": "a"}}]}),
    "sum": summed,
    "embedding": embedded,
    "ranks": lambda: Adapter.from_tensors(ragged("model.layers.{}.q_proj")),
    "strided": lambda: Adapter.from_tensors({"q": (gaussian(6, 48, seed=1).T[:, ::2], gaussian(16, 3, seed=2).T)}),
    "trained": lambda: Adapter.from_tensors({"q": (gaussian(8, 3, seed=1).requires_grad_(), gaussian(3, 8, seed=2))}),
}
PIECES: dict[str, Callable[[], Adapter]] = {
    "scaled by 3": lambda: made(scaling=3.0),
    "scaled float16": lambda: made(torch.float16, 2.0),
    "scaled far": lambda: made(scaling=2.0**-60),
    "float64": lambda: made(torch.float64),
    "mixed": mixed,
    "sum of two": lambda: made() + made(),
    "narrower": lambda: replace(made(), dtype=torch.bfloat16),
    "rank 0": lambda: made() - made(),
    "experts": lambda: Adapter.from_tensors(ragged("model.layers.0.block_sparse_moe.experts.{}.w1")),
    "large": lambda: Adapter.from_tensors(
        {f"m{i}": (gaussian(512, 64, seed=i), gaussian(64, 512, seed=i)) for i in range(9)}
    ),
    "extras": lambda: made(extras={"q.bias": Extra("value", gaussian(4, seed=1))}),
}


@pytest.mark.parametrize("core", [True, False], ids=["core", "torch"])
@pytest.mark.parametrize("kind", [*WHOLE, *PIECES])
def test_same_files(kind: str, core: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_JOINS", core and cpu._JOINS)
    adapter = {**WHOLE, **PIECES}[kind]()
    expected = contents(in_pieces(adapter, tmp_path / "pieces"))
    for i in range(2):  # the second time what they say alike is known
        is_whole = whole.whole_files(adapter) is not None
        assert is_whole == (kind in WHOLE)
        assert contents(adapter.save(tmp_path / f"whole{i}")) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pieces", "whole0", "whole1"]


def test_adapters_of_one_shape_are_their_own(tmp_path: Path) -> None:
    """Of equal shapes, ranks and names, but with another base model, name, layout or scaling."""
    adapters = [made(), made(scaling=2.0), replace(made(), name="other"), embedded()]
    adapters.append(Adapter.from_tensors({m: (u.B.stored, u.A.stored) for m, u in embedded().updates.items()}))  # type: ignore[misc]
    adapters.append(replace(made(), base=replace(made().base, model="org/other")))
    adapters += [made(dtype) for dtype in DTYPES]
    adapters += [Adapter.from_tensors({"q": (gaussian(8, 2, seed=1), gaussian(2, n, seed=2))}) for n in (7, 8, 9)]
    for i, adapter in enumerate([*adapters, *adapters]):
        assert contents(adapter.save(tmp_path / f"{i}")) == contents(in_pieces(adapter, tmp_path / f"{i} in pieces"))


OPTIONS: list[dict[str, Any]] = [
    {"dtype": "bfloat16"}, {"dtype": torch.float16}, {"dtype": torch.float32}, {"uniform_rank": True},
    {"uniform_rank": 7}, {"format": "mlx"}, {"format": "peft"}, {"overwrite": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(f"{k}_{v}" for k, v in o.items()))
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    adapter = Adapter.from_tensors(ragged("model.layers.{}.q_proj"))
    assert contents(adapter.save(tmp_path / "a", **options)) == contents(in_pieces(adapter, tmp_path / "b", **options))


def test_single_files_are_written_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has the name of a file"):
        made().save(tmp_path / "a.safetensors")
    form = replace(made(), base=replace(made().base, form=FileForm("kohya")))
    assert whole.whole_files(made()) is not None and whole.whole_files(form) is None
    assert not list(tmp_path.iterdir())


def test_notes_are_in_the_card(tmp_path: Path) -> None:
    told = made(notes=("Told.",)).save(tmp_path / "told")
    plain = made().save(tmp_path / "plain")
    assert ["Told" in (folder / "README.md").read_text() for folder in (told, plain)] == [True, False]


OTHERS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "ranks": lambda: ranks.among(ranks.Ranks(0, 2, None)),
    "stream": lambda: stream.streamed(cast(stream.Stream, object())),
    "spare": lambda: spare.offered(cast(spare.Spare, object())),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_others_have_a_part_in_is_left_to_them(other: str) -> None:
    assert whole.whole_files(made()) is not None
    with OTHERS[other]():
        assert whole.whole_files(made()) is None


def test_what_was_loaded_is_saved_again(tmp_path: Path) -> None:
    for i in range(2):
        saved = Adapter.from_tensors(make_factors(seed=i), name=f"a{i}").save(tmp_path / f"a{i}")
        loaded = load(saved)
        assert isinstance(loaded, Adapter)
        assert contents(loaded.save(tmp_path / f"b{i}")) == contents(saved)


def test_as_many_shapes_are_kept_as_it_says(tmp_path: Path) -> None:
    for i in range(whole.MOST_KNOWN + 2):
        Adapter.from_tensors({f"m{i}": (gaussian(8, 2, seed=1), gaussian(2, 8, seed=2))}).save(tmp_path / f"{i}")
    assert len(whole._known) == whole.MOST_KNOWN


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(value: float, tmp_path: Path) -> None:
    made().save(tmp_path / "known")
    adapter = made()
    next(iter(adapter.updates.values())).A.stored[-1, -1] = value  # type: ignore[index]
    with pytest.raises(OutputError, match=r"bad.* does not fit float32 \(NaN or Inf"):
        adapter.save(tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["known"]


def test_numbers_that_overflow(tmp_path: Path) -> None:
    factors = {m: (B.fill_(3e38), A, 2.0) for m, (B, A) in make_factors(dtype=torch.bfloat16).items()}
    with pytest.raises(OutputError, match="does not fit bfloat16"):
        Adapter.from_tensors(factors).save(tmp_path / "bad")
    assert not list(tmp_path.iterdir())


def something(place: Path, kind: str) -> Path:
    """What stands where an output shall be."""
    if kind == "file":
        place.write_text("x")
    elif kind == "empty folder":
        place.mkdir()
    elif kind == "folder":
        place.mkdir()
        (place / "x").write_text("x")
    elif kind == "link to nowhere":
        place.symlink_to(place.with_name("nowhere"))
    return place


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "link to nowhere", "own staging", "two folders"])
def test_what_stands_in_the_way(kind: str, tmp_path: Path) -> None:
    """It is told and left alone, or gone around, as ever."""

    def tried(save: Callable[[Path], object], place: Path) -> tuple[str, list[str]]:
        place.mkdir()
        if kind == "own staging":
            (place / f".out.partial-{os.getpid()}").mkdir()
        target = place / "a" / "b" / "out" if kind == "two folders" else something(place / "out", kind)
        try:
            save(target)
            said = "saved"
        except FastloraError as error:
            said = str(error).replace(str(place), "PLACE")
        return said, sorted(str(p.relative_to(place)) for p in place.rglob("*"))

    found = tried(made().save, tmp_path / "whole")
    assert found == tried(lambda path: in_pieces(made(), path), tmp_path / "pieces")


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (".", "..", "", "/"):
        with pytest.raises(OutputError):
            made().save(path)
    with pytest.raises(ValueError, match="null"):
        made().save("a\0b")
    assert not list(tmp_path.iterdir())
    made().save("~/own")
    made().save("here")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    made().save("link/other")
    assert sorted(os.listdir(tmp_path / "home")) == ["other", "own"] and (tmp_path / "here").is_dir()


FAILING = ["mkdir", "open", "writev", "write", "rename"]


@pytest.mark.parametrize("call", FAILING)
def test_a_full_disk_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "known")

    def full(*_: object) -> None:
        patch.undo()  # what is left is taken away by the same calls
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert not whole_output.placed(str(tmp_path / "new"), whole.whole_files(made()) or {})
    assert [p.name for p in tmp_path.iterdir()] == ["known"]


@pytest.mark.parametrize("call", FAILING)
def test_an_interruption_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(os, call)

    def stopped(*arguments: object) -> None:
        patch.undo()
        if call != "rename":
            original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, stopped)
        with pytest.raises(KeyboardInterrupt):
            made().save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has", ["all at once", "some bytes", "no such call"])
def test_pieces_that_are_written_in_parts(has: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(in_pieces(made(), tmp_path / "pieces"))
    if has == "some bytes":
        monkeypatch.setattr(os, "writev", lambda file, pieces: os.write(file, pieces[0][:100]))
    elif has == "no such call":
        monkeypatch.delattr(os, "writev")
    assert contents(made().save(tmp_path / "whole")) == expected
