"""What is linked with stand-ins for an older system's libraries asks for nothing newer."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
POLICY, MACHINE = "manylinux_2_28", "x86_64"
SOURCE = """
#include <condition_variable>
#include <csignal>
#include <mutex>
extern "C" double hypot(double, double);
extern "C" char only_in_newer_systems;
double wait(std::condition_variable& c, std::unique_lock<std::mutex>& lock, double x) {
    sigset_t all;
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    c.wait(lock);
    return hypot(x, only_in_newer_systems);
}
"""

pytestmark = [
    pytest.mark.package,
    pytest.mark.skipif(sys.platform != "linux", reason="the format is Linux's"),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("readelf")), reason="needs g++ and readelf"),
]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("auditwheel", reason="auditwheel is not installed (pip install 'fastlora[dev]')")
    monkeypatch.syspath_prepend(ROOT / "platforms")
    return importlib.import_module("stubs")


def test_the_versions_are_those_of_the_policy(stubs: ModuleType, tmp_path: Path) -> None:
    if not Path("/lib64/ld-linux-x86-64.so.2").exists():
        pytest.skip("for x86-64")
    stubs.make(tmp_path / "stubs", POLICY, MACHINE)
    (tmp_path / "x.cpp").write_text(SOURCE, encoding="utf-8")
    command = ["g++", "-shared", "-fPIC", f"-L{tmp_path / 'stubs'}", "-o", tmp_path / "x.so", tmp_path / "x.cpp"]
    subprocess.run(command, check=True)
    listed = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", tmp_path / "x.so"], check=True, capture_output=True, text=True
    ).stdout
    asked = dict(re.findall(r" UND (\w+)@(\S+)", listed))
    assert asked["hypot"] == asked["pthread_sigmask"] == "GLIBC_2.2.5"
    assert set(asked.values()) <= stubs.versions(POLICY, MACHINE)
    assert stubs.unbound(tmp_path / "x.so") == ["only_in_newer_systems"]
