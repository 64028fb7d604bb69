"""The CUDA backend on the emulator: the kernels' own source, compiled for this CPU."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastlora as fl
from fastlora.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 7}
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block may have on an H100


def _tool(name: str) -> str:
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} was not found: `pip install {name}`"
    return found


def build() -> Any:
    """Builds the module ``_emulated`` where its sources have changed, and imports it."""
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:  # tests that run in several processes build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _built(directory)
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest() -> str:
    """Of everything that the module is made of."""
    found = hashlib.sha256(sys.version.encode())
    for top in (ROOT / "CMakeLists.txt", ROOT / "csrc", Path(__file__).with_name("emulator")):
        for path in sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]:
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _built(directory: Path) -> Path:
    import pybind11

    library = directory / f"_emulated{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    made, digest = library.with_suffix(".txt"), _digest()
    if library.exists() and made.exists() and made.read_text(encoding="utf-8") == digest:
        return library  # without a second of CMake in every process
    configure = [
        _tool("cmake"), f"-S{ROOT}", f"-B{directory}", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        "-DFASTLORA_EMULATOR=ON", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={directory}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    for command in (configure, [_tool("cmake"), "--build", str(directory), "--parallel", jobs]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    made.write_text(digest, encoding="utf-8")
    return library


@contextlib.contextmanager
def emulated(module: Any, schedule: int = 0, shared_limit: int = SHARED_LIMIT) -> Iterator[None]:
    """Ops run on the emulated CUDA backend, on CPU tensors, with the threads of a block in the order ``schedule``."""
    module.set_schedule(schedule)
    module.set_shared_limit(shared_limit)
    with cuda.use_module(module, "cpu"), fl.use_backend("cuda"):
        yield


def barriers_not_missed(
    module: Any, call: Callable[[], object], of_warp: bool, total: int | None = None
) -> tuple[int, list[int]]:
    """Runs ``call`` without each of its barriers in turn: ``(barriers, those without which nothing is found)``.
    They are counted for the first thread, unless ``total`` says how many another comes to."""
    call()
    total = module.barriers(of_warp) if total is None else total
    missed = []
    try:
        for barrier in range(total):
            module.skip_barrier(barrier, of_warp)
            try:
                call()
                missed.append(barrier)
            except RuntimeError:
                pass
    finally:
        module.skip_barrier(-1, of_warp)
    return total, missed
