"""A folder that holds adapters stands for all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import make_adapter
from safetensors.torch import load_file, save_file

import fastlora as fl
from fastlora.errors import InputError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three adapters, and one entry for every reason to leave one out."""
    folder = tmp_path / "adapters"
    for i, name in enumerate(("step-10", "step-9", "last")):
        make_adapter(folder / name, seed=i)
    (folder / "README.md").write_text("what these are")
    (folder / "notes.txt").write_text("more of it")
    (folder / "logs").mkdir()
    shutil.copytree(DATA / "movie_ia3_a", folder / "ia3")
    shutil.copytree(DATA / "movie_dora", folder / "dora")
    shutil.copytree(folder / "last", folder / ".out.partial-12")
    fl.task_vector({"x.weight": torch.zeros(2, 2)}, {"x.weight": torch.ones(2, 2)}, "v").save(folder / "v.safetensors")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (make_adapter(folder / "cut") / "adapter_model.safetensors").write_bytes(b"\x08")
    return folder


def test_all_adapters_of_a_folder_in_natural_order(folder: Path) -> None:
    pool = fl.Pool.load(folder)
    assert pool.names == ["last", "step-9", "step-10"]
    assert torch.equal(pool["step-9"].delta(pool.modules[0]), fl.load(folder / "step-9").delta(pool.modules[0]))
    assert fl.Pool.load(str(folder)).names == fl.Pool.load([folder]).names == pool.names


def test_what_is_left_out_is_told_with_its_reason(folder: Path) -> None:
    notices = fl.Pool.load(folder).notices
    told = {n.removeprefix(f"{folder}: left out ").partition(": ")[0]: n for n in notices}
    assert set(told) == {
        "model.safetensors, notes.txt, README.md", "logs", "ia3", "dora", ".out.partial-12", "v.safetensors", "cut",
    }  # fmt: skip
    for name, words in {
        "model.safetensors, notes.txt, README.md": "a file that is no adapter",
        "logs": "no adapter_config.json",
        "ia3": "an (IA)³ adapter, and LoRA adapters are needed",
        "dora": "it is a DoRA adapter, and LoRA adapters are needed",
        ".out.partial-12": "never finished",
        "v.safetensors": "a task vector, and LoRA adapters are needed",
        "cut": "no readable safetensors",
    }.items():
        assert words in told[name]


def test_many_entries_of_one_reason_take_one_note(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a")
    for i in range(12):
        (tmp_path / f"{i}.log").write_text("")
    (note,) = fl.Pool.load(tmp_path).notices
    assert "left out 0.log, 1.log, 2.log, 3.log, 4.log, 5.log, 6.log, 7.log and 4 more: a file" in note


def test_folders_stand_among_other_sources(folder: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other")
    loaded = fl.load(make_adapter(tmp_path / "loaded"))
    assert fl.Pool.load([other, folder, loaded]).names == ["other", "last", "step-9", "step-10", "loaded"]
    again = make_adapter(tmp_path / "elsewhere" / "last")
    with pytest.raises(InputError, match=r"two adapters are called 'last' \(.*adapters/last and .*elsewhere/last\)"):
        fl.Pool.load([folder, again])


def test_folders_without_an_adapter_that_can_be_used(tmp_path: Path) -> None:
    shutil.copytree(DATA / "movie_ia3_a", tmp_path / "ia3" / "a")
    with pytest.raises(InputError, match=r"holds no adapter that can be used here \(a: it is an \(IA\)³ adapter"):
        fl.Pool.load([tmp_path / "ia3"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no adapter_config.json \(found: nothing\)"):
        fl.Pool.load([tmp_path / "empty"])
    with pytest.raises(InputError, match="not from the one path"):
        fl.Pool.load(tmp_path / "empty")


def test_one_adapter_is_no_folder_of_adapters(folder: Path) -> None:
    with pytest.raises(InputError, match="not from the one path"):
        fl.Pool.load(folder / "last")
    make_adapter(folder / "last" / "checkpoint-1")  # as trainers leave them
    assert "last" in fl.Pool.load(folder) and fl.Pool.load([folder / "last"]).names == ["last"]
    for single in (lambda: fl.load(folder), lambda: fl.Pool.load({"name": folder})):
        with pytest.raises(InputError, match=r"adapters .* and is none itself; pass one of them"):
            single()


def test_a_pool_without_extras_keeps_its_notices(folder: Path) -> None:
    file = make_adapter(folder / "head", modules_to_save=["lm_head"]) / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.ones(3, 3)}, file)
    pool = fl.Pool.load(folder)
    assert pool["head"].extras and pool.notices
    plain = pool.without_extras()
    assert plain.names == pool.names and plain.notices == pool.notices
    assert not any(adapter.extras for adapter in plain.adapters) and pool["head"].extras
