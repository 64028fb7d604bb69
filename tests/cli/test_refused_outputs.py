"""Outputs that would destroy something or cannot be written: one clear message, and what is there stays as it is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import make_adapter
from command import ADAPTERS, COMMAND, HANGS, environment, mounted, refused

SPAM, MOVIE = ADAPTERS / "spam", ADAPTERS / "movie_a"


def test_an_existing_output_stays_as_it_is(tmp_path: Path) -> None:
    make_adapter(tmp_path / "out")
    message = refused("merge", SPAM, MOVIE, "--out", "out", cwd=tmp_path)
    assert "exists" in message and "--overwrite" in message


def test_overwriting_refuses_what_is_no_earlier_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused("merge", SPAM, MOVIE, "--out", "out", "--overwrite", cwd=tmp_path)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in refused("merge", SPAM, MOVIE, "--out", "out", cwd=tmp_path)
    assert "is a file" in refused("merge", SPAM, MOVIE, "--out", "out/below", cwd=tmp_path)


def test_a_picture_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"a photograph")
    message = refused("overlap", SPAM, MOVIE, "--plot", "x.png", cwd=tmp_path)
    assert "x.png exists" in message and "--overwrite" in message


@pytest.mark.parametrize("out", ["good", "good/out", "."])
def test_an_output_inside_an_input_or_around_it(out: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "good")
    message = refused("merge", "good", MOVIE, "--out", out, "--overwrite", cwd=tmp_path)
    assert "one inside the other" in message or "no earlier output" in message


def without_override() -> None:
    """Takes from root, in the child, the right to write where permission bits forbid it."""
    drop_from_bounding_set, dac_override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, dac_override, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    directory.mkdir(mode=0o500)
    try:
        subprocess.run(["true"], preexec_fn=without_override, check=True)
    except subprocess.SubprocessError:
        pytest.skip("root may write everywhere here, and this right cannot be dropped")
    yield


def test_no_permission_to_write(tmp_path: Path) -> None:
    with unwritable(tmp_path / "locked"):
        for out in ("locked/out", "locked/deep/er/out"):
            message = refused("merge", SPAM, MOVIE, "--out", out, cwd=tmp_path, before=without_override)
            assert "locked is not writable" in message and "write elsewhere" in message
        message = refused("overlap", SPAM, MOVIE, "--plot", "locked/x.png", cwd=tmp_path, before=without_override)
        assert "locked/x.png" in message and "permission denied" in message


def test_a_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path / "locked", "ro,size=64k"):
        message = refused("merge", SPAM, MOVIE, "--out", "locked/out", cwd=tmp_path)
        assert "locked is not writable" in message and "write elsewhere" in message


WRITING = {
    "merge": ["merge", SPAM, MOVIE, "--method", "cat"],
    "decompose": ["decompose", SPAM, MOVIE],
    "compress": ["compress", SPAM, "--rank", "4"],
}


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk(command: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k"):
        for out in ("out", "deep/out"):
            message = refused(*WRITING[command], "--out", f"small/{out}", cwd=tmp_path)
            assert "disk is full" in message and f"small/{out}" in message and ".partial-" not in message


def test_a_picture_on_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k"):
        (tmp_path / "small" / "filler").write_bytes(bytes(60 * 1024))
        message = refused("overlap", SPAM, MOVIE, "--plot", "small/x.png", cwd=tmp_path)
        assert "disk is full" in message and "small/x.png" in message


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, 16 * 1024))


@pytest.mark.parametrize("command", WRITING)
def test_a_file_that_may_not_grow(command: str, tmp_path: Path) -> None:
    message = refused(*WRITING[command], "--out", "out", cwd=tmp_path, before=small_files_only)
    assert "out/" in message and ".partial-" not in message
    assert "could not be written: the file is larger than is allowed" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to print to")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"]])
def test_a_full_disk_behind_standard_output(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=HANGS
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "could not be printed" in done.stderr
