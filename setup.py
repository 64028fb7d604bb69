"""Builds fastlora._core with CMake. Everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_CHOICES = ("AUTO", "ON", "OFF")
EDITABLE = Path(__file__).resolve().parent / "build" / "editable"


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


def tool(name: str) -> str:
    """A build tool of this interpreter's environment, else from PATH: without isolation its bin/ may not be on PATH."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"fastlora: {name} was not found; `pip install {name}` or build with isolation")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("FASTLORA_CUDA", "AUTO").upper()
        if cuda not in CUDA_CHOICES:
            raise SystemExit(f"fastlora: FASTLORA_CUDA={cuda}: use one of {', '.join(CUDA_CHOICES)}")
        import pybind11

        # An editable install brings a folder that is gone afterwards: one that stays saves the next one the compiler.
        build = (EDITABLE if self.editable_mode else Path(self.build_temp).resolve()) / ext.name
        build.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"-S{Path(__file__).resolve().parent}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTLORA_CUDA={cuda}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        if archs := os.environ.get("FASTLORA_CUDA_ARCHS"):
            arguments.append(f"-DFASTLORA_CUDA_ARCHS={archs}")
        # A cache left by an isolated build names tools of an environment that is gone; a fresh configure is cheap.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([tool("cmake"), *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)


core = os.environ.get("FASTLORA_CORE", "ON").upper()
if core not in ("ON", "OFF"):
    raise SystemExit(f"fastlora: FASTLORA_CORE={core}: use ON, or OFF for a package without compiled kernels")
if core == "OFF":  # pure Python: plain torch computes
    setup()
else:
    setup(ext_modules=[CMakeExtension("fastlora._core")], cmdclass={"build_ext": CMakeBuild})
