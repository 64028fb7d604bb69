"""Processes of their own: Triton interprets kernels in one and compiles them in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def execute(*arguments: str | Path, **env: str) -> str:
    """What a Python process prints; the environment decides whether Triton interprets."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FASTLORA_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
