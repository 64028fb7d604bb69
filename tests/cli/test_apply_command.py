"""``fastlora apply``: what it takes and what it says. What it computes is tested in tests/checkpoints."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter
from command import done, mounted, refused, tree
from damaged_models import CODED, DAMAGES, Q, quantised, shards
from safetensors.torch import load_file, save_file
from stored_models import adapter
from tolerances import SUMS32

import fastlora as fl

SHAPE = 160, 96  # 61 kB


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model ``base`` and two adapters, ``a`` and ``b``."""
    (tmp_path / "base").mkdir()
    save_file({"layer.weight": gaussian(*SHAPE, seed=1)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, {"layer": SHAPE}, rank=2, seed=5 + seed)
    return tmp_path


def change(place: Path, out: str = "out") -> torch.Tensor:
    before, after = (load_file(place / f / "model.safetensors")["layer.weight"].double() for f in ("base", out))
    return after - before


def delta(place: Path, name: str) -> torch.Tensor:
    loaded = fl.load(place / name)
    assert isinstance(loaded, fl.Adapter)
    return loaded.delta("layer").double()


def test_weights(place: Path) -> None:
    said = done("apply", "base", "a:0.5", "second=b:-2", "--out", "out", "--memory", "1GiB", cwd=place)
    assert said.out == "written: out\n"
    torch.testing.assert_close(change(place), 0.5 * delta(place, "a") - 2 * delta(place, "b"), rtol=0, atol=SUMS32)


def test_an_expression(place: Path) -> None:
    done("apply", "base", "a=a", "b=b", "--expr", "-a + 2*unique(b | a)", "--out", "out", cwd=place)
    wanted = fl.compose("-a + 2*unique(b | a)", {"a": place / "a", "b": place / "b"})
    assert isinstance(wanted, fl.Adapter)
    torch.testing.assert_close(change(place), wanted.delta("layer").double(), rtol=0, atol=SUMS32)
    for arguments, message in (
        (["a=a:0.5", "--expr", "a"], "weights have no meaning"),
        (["a=a", "b=b", "--expr", "a"], "does not use b"),
        (["a=a", "--expr", "a", "--method", "ties"], "give one of both"),
    ):
        assert message in refused("apply", "base", *arguments, "--out", "new", cwd=place)
    assert not (place / "new").exists() and not list(place.glob(".*"))


def test_a_method(place: Path) -> None:
    said = done(
        "apply", "base", "a", "b:0.5", "--method", "ties", "--set", "density=0.5", "--out", "out", "--json", cwd=place
    )
    assert json.loads(said.out) == {"out": "out", "notices": []}
    pool = fl.Pool.load([place / "a", place / "b"])
    wanted = fl.merge(pool, {"a": 1.0, "b": 0.5}, method="ties", density=0.5, rank=96).delta("layer").double()
    torch.testing.assert_close(change(place), wanted, rtol=0, atol=SUMS32)
    done("apply", "base", "a", "b", "--method", "svd", "--rank", "1", "--out", "cut", "--quiet", cwd=place)
    assert int((torch.linalg.svdvals(change(place, "cut")) > 1e-4).sum()) == 1
    for arguments, message in (
        (["--set", "density=0.5"], "give --method too"),
        (["--rank", "3"], "give --method too"),
        (["--method", "ties", "--set", "density=7"], "density=7"),
        (["--method", "tie"], "does not exist"),
    ):
        assert message in refused("apply", "base", "a", "b", *arguments, "--out", "new", cwd=place)


def test_dtype_and_overwriting(place: Path) -> None:
    done("apply", "base", "a", "--out", "out", "--dtype", "bfloat16", cwd=place)
    assert load_file(place / "out/model.safetensors")["layer.weight"].dtype == torch.bfloat16
    assert json.loads((place / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    before = tree(place / "out")
    assert "--overwrite" in refused("apply", "base", "a", "--out", "out", cwd=place)
    assert tree(place / "out") == before
    done("apply", "base", "b", "--out", "out", "--overwrite", cwd=place)
    torch.testing.assert_close(change(place), delta(place, "b"), rtol=0, atol=SUMS32)
    assert "int8" in refused("apply", "base", "a", "--out", "new", "--dtype", "int8", cwd=place)
    assert "must be one" in refused("apply", "base", "a", "--out", "new.safetensors", cwd=place)
    assert "NAME.safetensors" in refused("apply", "base/model.safetensors", "a", "--out", "new", cwd=place)
    assert "one inside the other" in refused("apply", "base", "a", "--out", "a/model", cwd=place)


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, 16 * 1024))


def test_places_that_cannot_hold_it(place: Path) -> None:
    message = refused("apply", "base", "a", "--out", "out", cwd=place, before=small_files_only)
    assert "out/model.safetensors could not be written: the file is larger than is allowed" in message
    with mounted(place / "small", "size=64k"):
        message = refused("apply", "base", "a", "--out", "small/out", cwd=place)
        assert "small/out/model.safetensors could not be written: the disk is full" in message
        assert not list((place / "small").iterdir())
    shutil.rmtree(place / "small")
    with mounted(place / "small", "ro,size=64k"):
        assert "not writable; write elsewhere" in refused("apply", "base", "a", "--out", "small/out", cwd=place)
    shutil.rmtree(place / "small")
    (place / "taken").write_text("")
    assert "taken is a file" in refused("apply", "base", "a", "--out", "taken/out", cwd=place)
    assert "/proc" in refused("apply", "base", "a", "--out", "/proc/out", cwd=place)
    (place / "taken").unlink()
    assert {p.name for p in place.iterdir()} == {"base", "a", "b"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, tmp_path: Path) -> None:
    folder, given = shards(tmp_path)
    given.save(tmp_path / "a")
    DAMAGES[damage][0](folder)
    assert DAMAGES[damage][1] in refused("apply", "base", "a", "--out", "out", cwd=tmp_path)


@pytest.mark.parametrize("coded", CODED)
def test_quantised_models(coded: str, tmp_path: Path) -> None:
    quantised(tmp_path / "base", coded)
    adapter("x", {Q: (8, 8)}).save(tmp_path / "a")
    message = refused("apply", "base", "a", "--out", "out", cwd=tmp_path)
    assert Q in message and CODED[coded][2] in message and "Merge the adapters into one" in message
