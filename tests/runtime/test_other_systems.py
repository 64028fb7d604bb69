"""What only some systems have: portable forms take its place, and results are the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_adapter

import fastlora as fl
from fastlora.runtime import system

pytestmark = pytest.mark.portable

CALLS = "pread", "preadv", "pwrite", "posix_fallocate", "copy_file_range", "register_at_fork", "O_CLOEXEC"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without the calls, in this process."""
    for name in CALLS:
        monkeypatch.delattr(os, name, raising=False)


def test_adapters_are_read_and_written_by_what_every_system_has(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / "pool" / name, seed=i)
    script = Path(__file__).with_name("other_system.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "pool", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(fl.__file__).parents[1]), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "long" / "x").read_text() == "whole"
    if sys.platform == "linux":
        assert {*CALLS, "O_TMPFILE", "fork"} <= set(done.stdout.splitlines()[-1].split())
    a, b = (fl.load(tmp_path / "pool" / name) for name in "ab")
    with fl.use_backend("torch"):
        (0.5 * a + b).save(tmp_path / "expected" / "sum")
        fl.decompose(fl.Pool([a, b])).save(tmp_path / "expected" / "parts")
        fl.merge(fl.Pool([a, b]), method="ties", energy=0.99).save(tmp_path / "expected" / "merged")
    for expected in sorted((tmp_path / "expected").rglob("*.safetensors")):
        found = tmp_path / "out" / expected.relative_to(tmp_path / "expected")
        first, second = fl.load(expected.parent), fl.load(found.parent)
        assert first.modules == second.modules
        for module in first.modules:
            assert float((first.delta(module) - second.delta(module)).norm()) <= 1e-6 * float(
                first.delta(module).norm()
            )


def test_places_in_files(bare: None, tmp_path: Path) -> None:
    path, copy = tmp_path / "x", tmp_path / "y"
    with path.open("w+b") as file, copy.open("w+b") as other:
        system.make_room(file.fileno(), 12)
        assert path.stat().st_size == 12
        system.write_all_at(file.fileno(), memoryview(b"world"), 7)
        system.write_all_at(file.fileno(), memoryview(b"hello, "), 0)
        memory = bytearray(5)
        assert system.read_at(file.fileno(), memoryview(memory), 7) == 5 and memory == b"world"
        assert system.copy_at(file.fileno(), other.fileno(), 5, 99, 2) == 7
    assert path.read_bytes() == b"hello, world" and copy.read_bytes() == b"\0\0, world"
    file = system.open_to_read(path)
    try:
        assert os.read(file, 99) == b"hello, world"
    finally:
        os.close(file)


def test_a_full_disk_is_no_missing_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with (tmp_path / "x").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        system.make_room(file.fileno(), 12)
