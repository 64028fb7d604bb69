"""The stand-ins for CUDA's libraries (tests/on_gpu/rehearsal) compile: only ``make rehearsal`` runs them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REHEARSAL = Path(__file__).resolve().parents[1] / "on_gpu" / "rehearsal"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH, and its headers are needed")
@pytest.mark.parametrize("source", ["runtime.cpp", "driver.cpp"])
def test_a_stand_in_compiles(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REHEARSAL), *sys.path])
    headers = runpy.run_path(str(REHEARSAL / "run.py"), run_name="rehearsal")["_cuda_headers"]()
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{headers}", str(REHEARSAL / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
