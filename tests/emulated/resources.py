"""What the compiled CUDA kernels take of a multiprocessor, by ptxas; ``python tests/emulated/resources.py`` writes
resources.json, the limits that the tests hold them to."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Path(__file__).with_name("resources.json")
# device.cu holds no kernel.
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.name != "device.cu")
ARCHITECTURES = ["sm_80", "sm_90"]

# Registers, stack bytes, spilled bytes (stored and loaded), static shared memory and instructions in bytes.
Resources = dict[str, int]

KERNEL = re.compile(r"Compiling entry function '(\S+)' for")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SECTION = re.compile(r"\s\.text\.(\S+)\s+PROGBITS\s+\w+\s+\w+\s+(\w+)")


def missing_tool() -> str | None:
    """Why the kernels cannot be looked at here."""
    for tool, package in (("nvcc", "the CUDA toolkit"), ("c++filt", "binutils"), ("readelf", "binutils")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed ({package})"
    return None


def readable(symbol: str) -> str:
    """``eigh_warp_kernel<float>`` of a mangled name."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("fastlora::cuda::", "")
    return re.sub(r"\(.*\)$", "", name.removeprefix("void ")).replace("(bool)1", "true").replace("(bool)0", "false")


def compiled(source: str, architecture: str) -> dict[str, Resources]:
    """The kernels of one source for one architecture, compiled as the build does."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v",
            "-I", ROOT / "csrc" / "include", "-o", Path(directory, "out.cubin"), ROOT / "csrc" / "cuda" / source,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        listing = ["readelf", "-SW", Path(directory, "out.cubin")]
        sections = subprocess.run(listing, capture_output=True, text=True).stdout
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "warning" not in printed, printed
    sizes = {symbol: int(size, 16) for symbol, size in SECTION.findall(sections)}
    kernels = {}
    parts = KERNEL.split(printed)[1:]  # symbol, text, symbol, text …
    for symbol, text in zip(parts[::2], parts[1::2], strict=True):
        stack, registers, shared = STACK.search(text), USED.search(text), SHARED.search(text)
        assert stack and registers, text
        kernels[readable(symbol)] = {
            "registers": int(registers[1]),
            "stack": int(stack[1]),
            "spills": int(stack[2]) + int(stack[3]),
            "shared": int(shared[1]) if shared else 0,
            "code": sizes[symbol],
        }
    return kernels


def every_kernel() -> dict[str, dict[str, dict[str, Resources]]]:
    """By architecture, source and kernel."""
    return {a: {source: compiled(source, a) for source in SOURCES} for a in ARCHITECTURES}


if __name__ == "__main__":
    LIMITS.write_text(json.dumps(every_kernel(), indent=2) + "\n")
