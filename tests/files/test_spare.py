"""Files that were made beforehand: what is written into them, and when there are none."""

import gc
import os
import stat
from pathlib import Path

import pytest
import torch
from compiled import ON_HOST
from safetensors.torch import load_file
from torch import Tensor

import fastlora as fl
from fastlora.errors import OutputError
from fastlora.files import spare as spare_files
from fastlora.files.spare import Spare, offered
from fastlora.runtime import system

SIZE = 4 * 2**20


@pytest.fixture
def adapter() -> fl.Adapter:
    generator = torch.Generator().manual_seed(3)
    factors = {f"layers.{i}.q": (torch.randn(65, 4, generator=generator), torch.randn(4, 33, generator=generator))
               for i in range(3)}  # fmt: skip
    return fl.Adapter.from_tensors(factors, name="a")


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder on either kind of file system."""
    if request.param == "memory":
        place: Path = request.getfixturevalue("memory_folder")
        return place
    if system.file_system(tmp_path) != "ext4":
        pytest.skip(f"temporary files are on {system.file_system(tmp_path)}, not on ext4")
    return tmp_path


@pytest.mark.parametrize("backend", ON_HOST)
@pytest.mark.parametrize("what", ["sum", "stored"])
def test_an_adapter_in_a_spare_is_the_same_file(folder: Path, adapter: fl.Adapter, backend: str, what: str) -> None:
    result = 0.3 * adapter + 0.5 * fl.Adapter.from_tensors(adapter.tensors(), name="b") if what == "sum" else adapter
    spare = Spare(folder)
    spare.make(SIZE)
    with fl.use_backend(backend):
        result.save(folder / "plain")
        with offered(spare):
            result.save(folder / "spared")
    assert spare.take(folder / "again", SIZE) is None, "the spare was not used"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (folder / place / name for place in ("plain", "spared"))
        assert one.read_bytes() == other.read_bytes()
        assert stat.S_IMODE(one.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_what_is_not_finite_is_refused_in_a_spare_too(memory_folder: Path, adapter: fl.Adapter) -> None:
    spare = Spare(memory_folder)
    spare.make(SIZE)
    with offered(spare), pytest.raises(OutputError, match="does not fit float16"):
        (1e30 * adapter).save(memory_folder / "out", dtype="float16")
    assert list(memory_folder.iterdir()) == []


def test_one_spare_serves_one_file_and_only_a_shorter_one(memory_folder: Path, adapter: fl.Adapter) -> None:
    spare = Spare(memory_folder)
    spare.make(8)
    with offered(spare):
        adapter.save(memory_folder / "longer")
    spare.make(SIZE)
    with offered(spare):
        adapter.save(memory_folder / "first")
        adapter.save(memory_folder / "second")
    found = [tensors(memory_folder / name) for name in ("longer", "first", "second")]
    for name, tensor in found[0].items():
        assert all(torch.equal(tensor, other[name]) for other in found[1:])
    assert sorted(p.name for p in memory_folder.iterdir()) == ["first", "longer", "second"]  # a spare has no name


def test_what_is_mapped_stays_until_the_next_spare(memory_folder: Path) -> None:
    spare = Spare(memory_folder)
    spare.make(100)
    address = spare.take(memory_folder / "file", 60)
    assert address is not None and address > system.LARGEST_DESCRIPTOR
    system.write_all_at(address, memoryview(b"x" * 10), 50)
    assert (memory_folder / "file").read_bytes() == bytes(50) + b"x" * 10
    assert spare.take(memory_folder / "other", 60) is None


def test_a_file_that_is_there_is_not_replaced(memory_folder: Path) -> None:
    (memory_folder / "file").write_text("mine")
    spare = Spare(memory_folder)
    spare.make(100)
    assert spare.take(memory_folder / "file", 60) is None
    assert (memory_folder / "file").read_text() == "mine"


def test_it_stops_for_who_waits(memory_folder: Path) -> None:
    turns = iter([True, False])
    spare = Spare(memory_folder)
    spare.make(3 * SIZE, go_on=lambda: next(turns))
    assert spare.take(memory_folder / "file", 1) is None


def test_without_room_none_is_kept(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    spare = Spare(memory_folder)
    gc.collect()  # what earlier tests left open is closed now, and not in between
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        spare.make(100)
    assert spare.take(memory_folder / "file", 1) is None and len(os.listdir("/proc/self/fd")) == before


def test_on_an_unknown_file_system_there_is_none(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_files, "file_system", lambda _: "btrfs")
    spare = Spare(memory_folder)
    spare.make(100)
    assert spare.take(memory_folder / "file", 1) is None
