"""Interrupted runs: what is finished stays finished, and nothing loads before all is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored_models import adapter, model_file

import fastlora as fl
from fastlora.checkpoints import streaming


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_interrupted_and_resumed(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    names = {f"l.{i}.q_proj.weight": (16, 16) for i in range(5)} | {"norm": (16,)}
    model_file(tmp_path / "m.safetensors", names)
    one = adapter("x", {f"l.{i}.q_proj": (16, 16) for i in range(5)})
    fl.apply(tmp_path / "m.safetensors", one, tmp_path / "whole.safetensors")
    do, calls = streaming.do, []

    def stopping(*args: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Stop
        do(*args)

    threads(1)
    monkeypatch.setattr(streaming, "do", stopping)
    out = tmp_path / "out.safetensors"
    with pytest.raises(Stop):
        fl.apply(tmp_path / "m.safetensors", one, out)
    monkeypatch.setattr(streaming, "do", do)
    assert not out.exists() and not list(tmp_path.glob(".out*/*.safetensors"))
    with pytest.raises(fl.OutputError, match="--resume"):
        fl.apply(tmp_path / "m.safetensors", one, out)
    with pytest.raises(fl.OutputError, match="another one"):
        fl.apply(tmp_path / "m.safetensors", one * 2, out, resume=True)
    fl.apply(tmp_path / "m.safetensors", one, out, resume=True)
    a, b = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(a[n], b[n]) for n in names) and not list(tmp_path.glob(".*"))


def test_nothing_is_left_of_a_run_that_finished_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file(tmp_path / "m.safetensors", {"q.weight": (16, 16)})
    monkeypatch.setattr(streaming, "do", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fl.apply(tmp_path / "m.safetensors", adapter("x", {"q": (16, 16)}), tmp_path / "deep/out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


KILLER = """
import itertools, os, random, signal, sys, time
import fastlora as fl
from fastlora.checkpoints import streaming

kills, journal, do = int(sys.argv[1]), ".out.safetensors.unfinished/journal", streaming.do
adapter, chance = fl.load("x"), random.Random(int(sys.argv[2]))


def finished():
    return open(journal).read().count("\\n") - 1 if os.path.exists(journal) else 0


def slowly(*given):
    if next(begun) >= most:  # the kill comes late: however late, it meets the middle of the work
        time.sleep(600)
    time.sleep(0.002)
    do(*given)
    time.sleep(0.002)


streaming.do = slowly
seen = 0
for _ in range(kills):
    wanted = seen + chance.randint(1, 4)
    begun, most = itertools.count(), wanted - seen + 4
    child = os.fork()
    if not child:
        fl.apply("m.safetensors", adapter, "out.safetensors", resume=True)
        os._exit(0)
    while finished() < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.0005)
    time.sleep(chance.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was finished before it was killed"
    seen = finished()
    assert not os.path.exists("out.safetensors"), os.listdir(".")
    assert not [f for f in os.listdir(".out.safetensors.unfinished") if f.endswith(".safetensors")]
    print(seen, flush=True)
"""


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed at moments of which every one is in the middle of the work, and resumed from what it left."""
    names = {f"l.{i}.q_proj.weight": (256, 128) for i in range(60)}
    model_file(tmp_path / "m.safetensors", names, torch.bfloat16)
    adapter("x", {f"l.{i}.q_proj": (256, 128) for i in range(60)}).save(tmp_path / "x")
    fl.apply(tmp_path / "m.safetensors", fl.load(tmp_path / "x"), tmp_path / "whole.safetensors")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, "5", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = [int(line) for line in done.stdout.split()]
    assert len(seen) == 5 and all(0 < n < 60 for n in seen)
    fl.apply(tmp_path / "m.safetensors", fl.load(tmp_path / "x"), tmp_path / "out.safetensors", resume=True)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_files_of_one_name_are_resumed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Components of a pipeline have files of one name and tensors at the same places."""
    for component in ("text_encoder", "text_encoder_2"):
        (tmp_path / "base" / component).mkdir(parents=True)
        model_file(tmp_path / "base" / component / "model.safetensors", {"l.q_proj.weight": (16, 16)})
    (tmp_path / "base" / "model_index.json").write_text("{}")
    one = adapter("x", {f"{c}.l.q_proj": (16, 16) for c in ("text_encoder", "text_encoder_2")})
    fl.apply(tmp_path / "base", one, tmp_path / "whole")
    do, calls = streaming.do, []

    def stopping(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise Stop
        do(*args)

    monkeypatch.setattr(streaming, "do", stopping)
    with pytest.raises(Stop):
        fl.apply(tmp_path / "base", one, tmp_path / "out")
    monkeypatch.undo()
    fl.apply(tmp_path / "base", one, tmp_path / "out", resume=True)
    for component in ("text_encoder", "text_encoder_2"):
        first, second = (load_file(tmp_path / f / component / "model.safetensors") for f in ("whole", "out"))
        assert torch.equal(first["l.q_proj.weight"], second["l.q_proj.weight"])
