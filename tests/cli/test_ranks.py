"""Commands on two ranks of torchrun: the bits of one process, one voice, one end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.builders import shared_pool
from tests.cli.command import HANGS, environment

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # on a port that is free
SECONDS = 60.0  # in which a rank that is gone ends the run: a machine that is busy takes some of them
LARGE = {f"layers.{i}.q_proj": (512, 512) for i in range(60)}
SCRIPT = """
import sys
import torch
import fastlora as fl

out, *paths = sys.argv[1:]
with fl.distributed():
    pool = fl.Pool.load(paths)
    shapes = {f"layers.{i}.q.weight": (40 + i, 1100 if i == 1 else 24) for i in range(5)}
    shapes["head.weight"] = (1200, 1100)  # by random numbers
    torch.manual_seed(0)
    base, tuned = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(2))
    fl.extract(base, tuned, rank=4).save(f"{out}/extracted")
    a, b, *_ = pool.adapters
    fl.modulate(a, fl.dipm.shift(a, b, 0.3)).save(f"{out}/modulated")
    print(fl.overlap(pool).cosine.tolist(), file=open(f"{out}/cosines", "w"))
    for mode in ("pool", "pairs"):
        fl.decompose(pool, mode=mode).save(f"{out}/{mode}")
    pool.adapters[0].compress(2).save(f"{out}/compressed")
    for method in ("svd", "slerp", "ties"):
        fl.merge(pool.subset(pool.names[:2]), method=method, rank=2, min_energy=0 if method == "ties" else None).save(
            f"{out}/{method}"
        )
"""


def _start(*arguments: str | Path, **changes: str) -> subprocess.Popen[str]:
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment(variables), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _told(text: str) -> list[str]:
    """What the ranks say themselves: torchrun has a table of its own."""
    return [line for line in text.splitlines() if line.startswith(("error:", "interrupted:"))]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _second_rank(process: subprocess.Popen[str]) -> int:
    """The process of rank 1, of those that torchrun started; 0 where it is gone."""
    with contextlib.suppress(OSError):  # they may end meanwhile
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    return 0


def test_same_bits_on_two_ranks(tmp_path: Path) -> None:
    paths, script = shared_pool(tmp_path), tmp_path / "script.py"
    script.write_text(SCRIPT)
    alone = _start(script, tmp_path / "one", *paths)
    ranks = _start(*TORCHRUN, script, tmp_path / "two", *paths)
    told = [process.communicate(timeout=HANGS)[0] for process in (alone, ranks)]
    assert (alone.returncode, ranks.returncode) == (0, 0), told
    assert len(_files(tmp_path / "one")) > 10
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_one_rank_finds_nan_and_both_end(tmp_path: Path) -> None:
    paths, out = shared_pool(tmp_path), tmp_path / "out"
    file = paths[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    process = _start(*TORCHRUN, "-m", "fastlora", "decompose", *paths, "--out", out)
    (message,) = _told(process.communicate(timeout=HANGS)[0])
    assert "holds NaN or Inf" in message
    assert process.returncode
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    paths = shared_pool(tmp_path, 4, LARGE, rank=16)
    for attempt in range(10):  # a run that is over before the kill tells nothing
        root = tmp_path / f"root-{attempt}"
        root.mkdir()
        process = _start(*TORCHRUN, "-m", "fastlora", "decompose", *paths, "--mode", "pairs", "--out", root / "out")
        victim = 0
        while process.poll() is None and not (any(root.glob(".out.partial*")) and (victim := _second_rank(process))):
            time.sleep(0.002)
        if victim:
            os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        said = process.communicate(timeout=HANGS)[0]
        seconds = time.monotonic() - killed
        if not (root / "out").exists():
            break
    (message,) = _told(said)
    assert seconds < SECONDS
    assert message.startswith("error: rank 1 ended without a word")
    assert not list(root.iterdir())


def test_nonsense_in_the_environment(tmp_path: Path) -> None:
    process = _start(
        "-m", "fastlora", "decompose", *shared_pool(tmp_path), "--out", tmp_path / "out",
        TORCHELASTIC_RUN_ID="1", RANK="0", WORLD_SIZE="two",
    )  # fmt: skip
    (message,) = _told(process.communicate(timeout=HANGS)[0])
    assert "WORLD_SIZE='two'" in message
    assert process.returncode == 2
