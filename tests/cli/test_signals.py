"""A signal that surely meets a run while it imports, reads or writes: nothing is left that loads."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import make_adapter
from command import ADAPTERS, COMMAND, HANGS, environment, refused, run, tree

import fastlora as fl

SPAM, MOVIE = ADAPTERS / "spam", ADAPTERS / "movie_a"


def has_mapped(process: int, file: str) -> bool:
    with contextlib.suppress(OSError):
        return file in Path(f"/proc/{process}/maps").read_text()
    return False


def is_importing(process: int, _: Path) -> bool:
    return has_mapped(process, "libtorch")


def is_reading(process: int, _: Path) -> bool:
    return has_mapped(process, "adapter_model.safetensors")


def is_writing(_: int, root: Path) -> bool:
    return any(root.glob(".out.partial-*/**/adapter_model.safetensors"))


def default_signals() -> None:
    """A shell that started these tests in the background has SIGINT ignored, which children inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


Moment = Callable[[int, Path], bool]


def signalled_when(ready: Moment, number: signal.Signals, root: Path, *options: str) -> tuple[int, str, str] | None:
    """Stops a run when ``ready``, so that the signal meets it there; ``None`` when it was over, or had its output in
    place, before: this process may see late that it is ready, and stop it later yet."""
    process = subprocess.Popen(
        [*COMMAND, "decompose", *(f"pool/adapter{i}" for i in range(4)), "--out", "out", *options],
        cwd=root,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        while process.poll() is None and not ready(process.pid, root):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    is_late = process.returncode == 0 or err.endswith("out is complete\n")
    if number == signal.SIGKILL:  # which says nothing
        is_late |= not any(root.glob(".out.partial-*"))
    return None if is_late else (process.returncode, out, err)


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that takes a while to decompose and to write."""
    root = tmp_path_factory.mktemp("pool")
    modules = {f"model.layers.{i}.mlp.up_proj": (1024, 768) for i in range(24)}
    for i in range(4):
        make_adapter(root / f"adapter{i}", modules, rank=32, seed=i)
    return root


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far a run is")


def surely_signalled_when(
    ready: Moment, number: signal.Signals, root: Path, *options: str
) -> tuple[Path, int, str, str]:
    """Tried again, in a copy of ``root`` each time, where a run is over before the signal: ``(that copy, exit code,
    standard output, standard error)``."""
    for attempt in range(20):
        kept = shutil.copytree(root, root.parent / f"{root.name}-{attempt}", symlinks=True)
        found = signalled_when(ready, number, kept, *options)
        if found is not None:
            return kept, *found
    pytest.fail("every run was over before the signal")


def check_interrupted(ready: Moment, number: signal.Signals, root: Path, *options: str) -> None:
    """One line, the exit code of the signal, and all as it was."""
    before = tree(root)
    kept, *found = surely_signalled_when(ready, number, root, *options)
    said = "interrupted: no output is left half-written; run the same command again\n"
    assert found == [128 + number, "", said]
    assert tree(kept) == before


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ready", [is_importing, is_reading, is_writing])
def test_an_interrupted_run_leaves_nothing(
    ready: Moment, number: signal.Signals, long_work: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "pool").symlink_to(long_work)
    check_interrupted(ready, number, root)


@needs_proc
def test_an_interrupted_overwrite_keeps_the_earlier_output(long_work: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    fl.load(SPAM).save(root / "out" / "shared")
    (root / "pool").symlink_to(long_work)
    check_interrupted(is_writing, signal.SIGINT, root, "--overwrite")


def test_what_a_killed_run_leaves_does_not_load_and_is_told(long_work: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "pool").symlink_to(long_work)
    kept, *ended = surely_signalled_when(is_writing, signal.SIGKILL, root)
    assert ended == [-signal.SIGKILL, "", ""]
    (left,) = kept.glob(".out.partial-*")
    for weights in left.rglob("adapter_model.safetensors"):
        assert "never finished" in refused("inspect", weights.parent, cwd=kept)
    found = run("merge", SPAM, MOVIE, "--out", "out", cwd=kept)
    assert found.code == 0 and f"{left} was left by a run that died and can be deleted" in found.err


def test_an_unfinished_output_does_not_load(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-123"
    shutil.copytree(SPAM, left)
    assert json.loads((left / "adapter_config.json").read_text())
    assert "never finished" in refused("inspect", f"left={left}", cwd=tmp_path)
