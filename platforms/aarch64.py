"""The kernels for aarch64: compiled by a cross compiler, and the tests of the ops run with them in an emulator.

    python platforms/aarch64.py FOLDER [tests/ops/test_eigh.py …]

Under the folder: a small Debian for that processor (its own packages, unpacked, not installed), torch and what else the
tests import, and the package with the compiled module. One process runs the tests in qemu's emulator of user programs.
Needs Debian with ``g++-aarch64-linux-gnu qemu-user-static``, and an interpreter of the version that this Debian has.
Without named tests the result is kept beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_name("aarch64.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# One without SVE: torch and its BLAS would use that, and the emulator takes ten times as long for it.
PROCESSOR = "neoverse-n1"
# The newest whose package for this processor needs no CUDA libraries.
TORCH = "torch==2.10.0"
NEEDED = ("numpy", "safetensors", "google-re2", "pyyaml", "typer", "rich", "lark", "pytest", "filelock", "fsspec",
          "jinja2", "networkx", "sympy", "typing_extensions")  # fmt: skip
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# What `make isas` runs for an instruction set: of plain torch and the reference nothing is compiled.
TESTS = ("tests/ops", "--ignore=tests/ops/test_dispatch.py", "--ignore=tests/ops/test_team.py")
LEFT_OUT = "not every_instruction_set and not reference and not long_halves"  # long ones are for tensor cores


def system(folder: Path) -> Path:
    """Debian's Python for the processor, with the libraries that it and torch need, in a folder."""
    root, apt = folder / "root", folder / "apt"
    if (root / "usr" / "bin" / f"python{VERSION}").exists():
        return root
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": apt / "state",
        "Dir::State::status": apt / "status", "Dir::Cache": apt / "cache", "Debug::NoLocking": 1,
    }  # fmt: skip
    get = ["apt-get", "-qq", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    run(*get, "update")
    packages = (f"python{VERSION}", f"libpython{VERSION}-dev", "libgomp1", "libstdc++6")
    run(*get, "-y", "--no-install-recommends", "--download-only", "install", *packages)
    root.mkdir(exist_ok=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, root)
    return root


def libraries(folder: Path) -> Path:
    """torch and the packages that the tests import."""
    site = folder / "site"
    if (site / "torch").exists():
        return site
    kinds = [word for name in PLATFORMS for word in ("--platform", name)]
    kinds += [word for abi in (f"cp{VERSION.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", *kinds]
    pip += ["--implementation", "cp", "--python-version", VERSION, "--target", site, "--upgrade"]
    run(*pip, *NEEDED)
    run(*pip, "--no-deps", TORCH)
    return site


def package(folder: Path, root: Path) -> Path:
    """The package with the compiled module of that processor."""
    lib, build = folder / "lib", folder / "build"
    tools = Path(sys.executable).parent
    headers = root / "usr" / "include"
    settings = {
        "CMAKE_TOOLCHAIN_FILE": Path(__file__).with_suffix(".cmake"), "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools / "ninja", "CMAKE_CXX_FLAGS": f"-I{headers}",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": lib / "fastlora", "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": headers / f"python{VERSION}", "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYTHON_MODULE_EXTENSION": f".cpython-{VERSION.replace('.', '')}-aarch64-linux-gnu.so",
        "FASTLORA_CUDA": "OFF", "FASTLORA_WERROR": "ON",
    }  # fmt: skip
    run(tools / "cmake", f"-S{ROOT}", f"-B{build}", "-GNinja", *(f"-D{k}={v}" for k, v in settings.items()))
    run(tools / "cmake", "--build", build)
    for name in ("fastlora", "tritonkernels"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__")  # the module of this processor
        shutil.copytree(ROOT / name, lib / name, dirs_exist_ok=True, ignore=left_out)
    return lib


def tested(folder: Path, root: Path, paths: list[Path], tests: list[str]) -> dict[str, object]:
    """Runs tests of the ops, and returns how many passed."""
    report = folder / "report.xml"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "QEMU_LD_PREFIX": str(root), "FASTLORA_ISA": "baseline",
        "PYTHONDONTWRITEBYTECODE": "1", "QEMU_CPU": PROCESSOR,
    }  # fmt: skip
    # -P: the sources, which have no module for that processor, lie in the working folder.
    command = [EMULATOR, root / "usr" / "bin" / f"python{VERSION}", "-P", "-c", "import pytest; exit(pytest.main())"]
    options = ["-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, f"--junitxml={report}"]
    start = time.monotonic()
    done = subprocess.run([*map(str, command), *options, *(tests or TESTS)], cwd=ROOT, env=env)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests ended with {done.returncode}")
    counts = next(xml.parse(report).iter("testsuite")).attrib
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    return {
        "passed": int(counts["tests"]) - failed - skipped, "failed": failed, "skipped": skipped,
        "minutes": round((time.monotonic() - start) / 60, 1), "tests": tests or TESTS, "left out": LEFT_OUT,
        "torch": TORCH.partition("==")[2], "compiler": first_line(COMPILER), "emulator": first_line(EMULATOR),
        "processor": PROCESSOR,
    }  # fmt: skip


def first_line(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", help="files of tests; without them all of tests/ops")
    given = parser.parse_args()
    for program, name in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user-static")):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} was not found: apt-get install {name}")
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    root = system(folder)
    site = libraries(folder)
    result = json.dumps(found := tested(folder, root, [package(folder, root), site], given.tests), indent=1)
    if not given.tests:
        RESULT.write_text(result + "\n", encoding="utf-8")
    print(result)
    raise SystemExit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
