"""What this machine is, in a second or two: nothing here imports torch, which may take a minute the first time."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

from benches.gpu.processes import ROOT, Failed, Shell, lines_of, tool

if TYPE_CHECKING:
    from benches.gpu.running import Visit

NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest")
TO_BUILD = ("pybind11", "cmake", "ninja", "setuptools")
USEFUL = ("cupy", "xdist", "hypothesis", "peft", "typer", "lark", "re2", "rich", "yaml")
VERSIONS = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy", "safetensors", "peft", "transformers")
DEVICE = {
    "name": "device",
    "driver_version": "driver",
    "compute_cap": "capability",
    "memory.total": "memory",
    "compute_mode": "compute mode",
    "clocks.max.sm": "highest clock",
    "power.limit": "power limit",
}
"""What nvidia-smi calls it → what the report does."""


def run(visit: Visit, limit: float) -> str:
    """Names device, versions and commit; starts the imports that everything after needs."""
    missing = [p for p in (*NEEDED, *TO_BUILD, *USEFUL) if importlib.util.find_spec(p) is None and tool(p) is None]
    visit.report.facts = facts = {
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "missing": missing,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "nvcc": _nvcc(),
        **_versions(),
        **_device(),
    }
    if absent := [p for p in NEEDED if p in missing]:
        raise Failed(f"{sys.executable} has no {', '.join(absent)}")
    for package in ("torch", "triton", *(["cupy"] if "cupy" not in missing else [])):
        # In logs of their own, as they run beside each other.
        shell = Shell(visit.temporary / f"import-{package}.log", visit.shell.python)
        visit.background[package] = shell.start(shell.python_command("-m", "benches.gpu.imported", package))
    said = [f"without {', '.join(missing)}"] if missing else []
    if facts.get("compute mode") not in (None, "Default"):
        said.append(f"compute mode {facts['compute mode']}: processes cannot share the device")
    return "; ".join(said)


def commit() -> str:
    """Of the checkout, from FASTLORA_COMMIT where there is none, such as in a copy of the files."""
    said = lines_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return os.environ.get("FASTLORA_COMMIT") or (said[0] if said else "not known")


def _nvcc() -> str:
    """The release of the compiler, or nothing."""
    if (program := tool("nvcc")) is None:
        return ""
    return next((line.rpartition(", ")[2] for line in lines_of([program, "--version"]) if "release" in line), "")


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device() -> dict[str, Any]:
    """By nvidia-smi; where there is none, torch names the device later."""
    program = tool("nvidia-smi")
    if program is None:
        return {}
    said = lines_of([program, f"--query-gpu={','.join(DEVICE)}", "--format=csv,noheader"])
    cells = [cell.strip() for cell in said[0].split(",")] if said else []
    if len(cells) != len(DEVICE):
        return {}
    return {ours: cell for ours, cell in zip(DEVICE.values(), cells, strict=True) if not cell.startswith("[")}
