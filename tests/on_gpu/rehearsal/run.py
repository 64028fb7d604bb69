"""``make rehearsal``: code for a GPU on a machine without one, under a stand-in for the CUDA runtime and driver.

``python run.py -m MODULE ARGUMENTS…`` or ``python run.py SCRIPT ARGUMENTS…`` runs Python as if there were an H100 of
8 GiB: torch built for CUDA makes its tensors and streams by the stand-in, the compiled CUDA kernels and Triton's are
launched there and their launches checked, and values come from the kernels' emulator and Triton's interpreter. Work is
done as late as a device may do it; REHEARSAL_AT_ONCE=default or =others does that of some streams at once (queue.h).
REHEARSAL_WITHOUT_CODE=1 makes it a device that the compiled CUDA kernels are not for.
Nothing here says how long anything takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[2] / "build" / "rehearsal" / "lib"
RESERVED = 1024  # bytes of shared memory
LIBRARIES = {"runtime.cpp": "libcudart.so.13", "driver.cpp": "libcuda.so.1"}


def _cuda_headers() -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("rehearsal: nvcc is not on the PATH, and the stand-in is compiled against its headers")
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    (top,) = (line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ TOP="))
    return Path(top) / "include"


def _wanted() -> set[str]:
    """Functions of the runtime that torch's libraries need to be loaded."""
    packages = Path(next(p for p in sys.path if (Path(p) / "torch").is_dir()))
    libraries = [*packages.glob("torch/lib/*.so"), *packages.glob("torch/_C*.so"), *packages.glob("nvidia/*/lib/*.so*")]
    said = subprocess.run(["nm", "-D", "--undefined-only", *map(str, libraries)], capture_output=True, text=True).stdout
    return {word.split("@")[0] for line in said.splitlines() if "@libcudart" in line for word in line.split()[-1:]}


def build() -> None:
    """Both libraries, where their sources are newer. Functions that nothing here calls end the process by name."""
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.h")]
    if all((BUILT / name).exists() for name in LIBRARIES.values()):
        if min((BUILT / n).stat().st_mtime for n in LIBRARIES.values()) > max(s.stat().st_mtime for s in sources):
            return
    BUILT.mkdir(parents=True, exist_ok=True)
    (BUILT / "exports.map").write_text("libcudart.so.13 { global: *; };\n", encoding="utf-8")
    text = (HERE / "runtime.cpp").read_text(encoding="utf-8")
    missing = [f for f in sorted(_wanted()) if f"{f}(" not in text]
    rest = "\n".join(f'void {f}() {{ rehearsal_missing("{f}"); }}' for f in missing)
    (BUILT / "missing.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\nstatic void rehearsal_missing(const char* name) {\n"
        '    std::fprintf(stderr, "rehearsal: runtime.cpp lacks %s\\n", name);\n    std::abort();\n}\n'
        f'extern "C" {{\n{rest}\n}}\n',
        encoding="utf-8",
    )
    compiler = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", f"-I{_cuda_headers()}"]
    for source, name in LIBRARIES.items():
        more = []
        if source == "runtime.cpp":
            more = [str(BUILT / "missing.cpp"), f"-Wl,--version-script={BUILT / 'exports.map'}"]
        command = [*compiler, str(HERE / source), *more, f"-Wl,-soname,{name}", "-o", str(BUILT / name)]
        subprocess.run(command, check=True)


def compiled_module() -> Path:
    """Of the package. While it is built it is not there; what runs meanwhile needs no kernels."""
    (top,) = importlib.util.find_spec("fastlora").submodule_search_locations
    return Path(top) / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


def static_shared() -> Path:
    """A table of the static shared memory of the package's CUDA kernels, as the compiler made them."""
    library, found = compiled_module(), []
    if library.exists():
        tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(library)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"Function (\S+):\s+REG:.*?SHARED:(\d+)", said)
    # With what the system keeps of a block that has any, and which no limit counts.
    sizes = {kernel: max(0, int(size) - RESERVED) for kernel, size in found}
    table, new = BUILT / "static_shared.txt", BUILT / f"static_shared.{os.getpid()}"
    new.write_text("".join(f"{kernel} {size}\n" for kernel, size in sizes.items()), encoding="utf-8")
    os.replace(new, table)  # several processes begin at once
    return table


def start() -> None:
    """This script again, with the stand-in in the place of CUDA's libraries."""
    build()
    variables = {
        "REHEARSAL_STATIC_SHARED": str(static_shared()),
        "LD_PRELOAD": str(BUILT / LIBRARIES["runtime.cpp"]),
        "LD_LIBRARY_PATH": str(BUILT),
        "TRITON_LIBCUDA_PATH": str(BUILT),
    }
    cache = {"TRITON_CACHE_DIR": str(BUILT.parent / "triton")}  # unless it is given
    os.execve(sys.executable, [sys.executable, *sys.argv], {**cache, **os.environ, **variables})


def main() -> None:
    if str(BUILT) not in os.environ.get("LD_LIBRARY_PATH", ""):
        start()
    import aten
    import streams

    aten.install()
    streams.install()
    if compiled_module().exists():
        import kernels

        kernels.install()
    del sys.argv[0]
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        runtime, driver = (ctypes.CDLL(name) for name in LIBRARIES.values())
        print(
            f"rehearsal: {runtime.rehearsal_launches()} launches of CUDA kernels, "
            f"{driver.rehearsal_triton_launches()} of Triton's",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
