"""Whatever ends a run, at whatever moment: an output is there and complete, or nothing is there that loads."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from builders import shared_pool
from command import done, mounted, tree
from stopping import Settings, Stopped, run_settings

import fastlora as fl
from fastlora.errors import InputError

BEFORE, UNFINISHED, AFTER, EDGES, TIMED = 12, 24, 6, 40, 6  # most where most is at stake
SIZES = 50
SURE = 9  # of ten: threads do not take turns in every run alike, so the last points of a part may lie in the next one
MODULES = {f"model.layers.{i}.mlp.up_proj": (512, 384) for i in range(24)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return shared_pool(tmp_path_factory.mktemp("pool"), 4, MODULES, rank=16, shared=4)


@pytest.fixture(scope="module")
def command(pool: list[Path]) -> list[str]:
    return ["decompose", *map(str, pool), "--threshold", "0.5", "--out", "out"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of an undisturbed run, with a digest of what it holds."""
    root = tmp_path_factory.mktemp("whole")
    done(*command, cwd=root)
    return tree(root / "out")


def stopped_at_moments(numbers: list[int], command: list[str], root: Path) -> list[Stopped]:
    found = run_settings(Settings(str(root), command, numbers, BEFORE, UNFINISHED, AFTER, EDGES, TIMED, sum(numbers)))
    assert len(found) == BEFORE + UNFINISHED + AFTER + EDGES + TIMED
    return found


def test_a_signal_at_any_moment(command: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    """Both take turns: one function stops the command for either."""
    interrupted: Counter[str] = Counter()
    for run in stopped_at_moments([signal.SIGINT, signal.SIGTERM], command, tmp_path):
        if run.code == 0:
            assert tree(Path(run.directory) / "out") == whole
            continue
        assert run.code == 128 + run.number, run.err
        assert run.err.startswith("interrupted: no output is left half-written; ")
        assert run.err.count("\n") == 1 and run.err.endswith("\n")
        if run.left:  # it came after the output was in place
            assert run.left == ["out"] and tree(Path(run.directory) / "out") == whole
            assert run.err.endswith("out is complete\n")
        else:
            assert run.err.endswith("run the same command again\n")
            interrupted[run.part] += 1
    assert 10 * interrupted["before"] >= SURE * BEFORE and 10 * interrupted["unfinished"] >= SURE * UNFINISHED


@pytest.mark.parametrize(("work", "code"), [("0", 0), ("1 / 0", None), ("fail()", 2)])
def test_a_signal_after_the_end_changes_nothing(work: str, code: int | None, tmp_path: Path) -> None:
    """Neither a traceback nor another exit code once that is known, whatever it is."""
    program = f"""
import os, signal
from fastlora.cli import exits
from fastlora.errors import InputError
def fail(): raise InputError("so")
exits.listen()
try:
    code = exits.guarded(lambda: {work})
except ZeroDivisionError:
    code = None
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(code, "and still here")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == f"{code} and still here\n"


def test_a_kill_at_any_moment(command: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    """Nothing can be said or cleaned up: what is left is hidden, refused by name, and whole where another reader
    would take it for an adapter."""
    unfinished: Counter[str] = Counter()
    for run in stopped_at_moments([signal.SIGKILL], command, tmp_path):
        assert run.code in (0, -signal.SIGKILL) and (run.code == 0 or not run.err)
        root = Path(run.directory)
        for entry in root.iterdir():
            if entry.name == "out":
                assert tree(entry) == whole
                continue
            assert entry.name.startswith(".out.partial-")
            unfinished[run.part] += 1
            for file in entry.rglob("adapter_model.safetensors"):
                with pytest.raises(InputError, match="never finished; run that command again"):
                    fl.load(file.parent)
                place = str(file.relative_to(entry))
                if (file.parent / "adapter_config.json").exists():
                    assert tree(file.parent)["adapter_model.safetensors"] == whole[place]
    assert 10 * unfinished["unfinished"] >= SURE * UNFINISHED


def check_limit(run: Stopped, words: str) -> bool:
    """Whether a run met a limit, which it must say in one line, leaving nothing."""
    if run.code == 0:
        assert run.left == ["out"]
        return False
    assert run.code == 2 and run.left == [], run.err
    assert run.err.startswith("error: ") and words in run.err and run.err.count("\n") == 1
    assert ".partial-" not in run.err
    return True


def sizes(most: float, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [max(1, int((i + draw.random()) / SIZES * most)) for i in range(SIZES)]


def test_a_disk_that_is_full_at_any_size(command: list[str], pool: list[Path], tmp_path: Path) -> None:
    needed = 1.5 * sum(p.stat().st_size for a in pool for p in a.iterdir())
    with mounted(tmp_path / "disk", "size=1m"):
        pages = [-(-size // 4096) * 4096 for size in sizes(needed, 0)]
        found = run_settings(Settings(str(tmp_path / "runs"), command, disk_sizes=pages, disk=str(tmp_path / "disk")))
        full = [check_limit(run, "the disk is full; free some space or write elsewhere") for run in found]
    assert len(full) == SIZES and SIZES // 2 <= sum(full) < SIZES


def test_files_that_may_not_grow(command: list[str], pool: list[Path], tmp_path: Path) -> None:
    largest = max(p.stat().st_size for a in pool for p in a.iterdir())
    found = run_settings(Settings(str(tmp_path), command, file_limits=sizes(1.5 * largest, 1)))
    full = [check_limit(run, "larger than is allowed here; write elsewhere") for run in found]
    assert len(full) == SIZES and SIZES // 2 <= sum(full) < SIZES
