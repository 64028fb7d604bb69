"""Triton: none, and another version."""

from __future__ import annotations

import fcntl
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

OLDEST = "3.6.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        reason = "Triton is not installed (pip install 'fastlora[triton]'; Linux on x86-64 alone has it)"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def oldest_triton() -> Path:
    """The oldest version that is supported, in a folder under build/."""
    folder = ROOT / "build" / f"triton-{OLDEST}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # tests that run in several processes install it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"triton-{OLDEST}.dist-info").exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
            command += ["--target", str(folder), f"triton=={OLDEST}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"Triton {OLDEST} cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder
