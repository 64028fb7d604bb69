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


def test_what_runs_before_the_module_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window imports torch under the stand-ins while the module is compiled."""
    monkeypatch.setattr(sys, "path", [str(REHEARSAL), *sys.path])
    run = runpy.run_path(str(REHEARSAL / "run.py"), run_name="rehearsal")
    monkeypatch.setitem(run["static_shared"].__globals__, "BUILT", tmp_path)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: ".not-built.so")
    assert not run["compiled_module"]().exists() and run["static_shared"]().read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["static_shared.txt"]
