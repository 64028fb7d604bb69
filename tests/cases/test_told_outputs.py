"""What is written over: what fastlora wrote with ``--overwrite``, anything else with ``--force`` alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter, shared_pool
from command import ROOT, done, refused, tree
from told import SMALL

import fastlora as fl
from fastlora.files.earlier import is_ours

WRITING = {
    "merge": ["merge", "a", "b"],
    "decompose": ["decompose", "a", "b"],
    "plots": ["decompose", "a", "b", "--plots"],
    "compress": ["compress", "a", "--rank", "2"],
    "modulate": ["modulate", "a", "--op", "scale:2"],
    "compose": ["compose", "x - y", "x=a", "y=b"],
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for path, name in zip(shared_pool(tmp_path / "pool", 2, SMALL), "ab", strict=True):
        path.rename(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("command", WRITING)
def test_a_command_replaces_what_it_wrote(command: str, here: Path) -> None:
    if command == "plots":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done(*WRITING[command], "-o", "out", cwd=here)
    written = tree(here / "out")
    done(*WRITING[command], "-o", "out", "--overwrite", cwd=here)
    assert tree(here / "out") == written


@pytest.mark.parametrize("mine", ["an adapter of peft", "a readme", "a bin", "a config alone", "a picture"])
def test_what_somebody_else_wrote_is_kept(mine: str, here: Path) -> None:
    """Also where its files have the names of an output."""
    out = here / "out"
    if mine == "an adapter of peft":
        make_adapter(out, SMALL)
    else:
        done("merge", "a", "b", "-o", "out", cwd=here)
        name = {"a readme": "README.md", "a bin": "adapter_model.bin", "a picture": "x.png"}.get(mine, "b.json")
        if mine == "a config alone":
            shutil.rmtree(out)
            out.mkdir()
            name = "adapter_config.json"
        (out / name).write_text("mine")
    message = refused("merge", "a", "b", "-o", "out", "--overwrite", cwd=here)
    assert "is no earlier output" in message and "--force (overwrite='force')" in message
    with pytest.raises(fl.OutputError, match="--force"):
        fl.load(here / "a").save(out, overwrite=True)
    done("merge", "a", "b", "-o", "out", "--force", cwd=here)
    assert fl.load(out).modules and is_ours(out / "README.md")
    assert not any(path.read_bytes() == b"mine" for path in out.iterdir())


def test_single_files(here: Path) -> None:
    model = {"q.weight": gaussian(4, 4, seed=1)}
    vector = fl.task_vector(model, {"q.weight": gaussian(4, 4, seed=2)}, "t")
    vector.save(here / "t.safetensors")
    vector.save(here / "t.safetensors", overwrite=True)
    for name in ("notes.md", "notes.txt", "table.csv"):
        (here / name).write_text("what I think of fastlora")
        assert not is_ours(here / name)
    (here / "table.csv").write_text("adapter,module,rank\n")
    assert is_ours(here / "table.csv")
    assert is_ours(ROOT / "docs" / "benchmarks.md") and not is_ours(ROOT / "README.md")
    (here / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(fl.OutputError, match=r"was not written by fastlora.*--force"):
        vector.save(here / "mine.safetensors", overwrite=True)
    vector.save(here / "mine.safetensors", overwrite="force")
    assert torch.equal(fl.load(here / "mine.safetensors").deltas["q.weight"], vector.deltas["q.weight"])


def test_pictures_say_who_drew_them(here: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for suffix in ("png", "pdf", "svg", "jpg"):
        done("overlap", "a", "b", "--plot", f"x.{suffix}", cwd=here)
        done("overlap", "a", "b", "--plot", f"x.{suffix}", "--overwrite", cwd=here)
        (here / f"x.{suffix}").write_bytes(b"a photograph")
        assert "--force" in refused("overlap", "a", "b", "--plot", f"x.{suffix}", "--overwrite", cwd=here)
    done("overlap", "a", "b", "--plot", "x.png", "--force", cwd=here)


def test_inputs_are_spared_even_by_force(here: Path) -> None:
    for out in ("a", ".", "a/out"):
        message = refused("merge", "a", "b", "-o", out, "--force", cwd=here)
        assert "one inside the other" in message or "current directory" in message
