"""The device's own kernels end to end, without a device; see ``whole_path.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compiled import needs_kernels


@needs_kernels
def test_interpreted_and_emulated() -> None:
    command = [sys.executable, str(Path(__file__).with_name("whole_path.py")), "emulated"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 5, done.stdout
