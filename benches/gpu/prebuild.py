"""``make gpu-prebuild``: what a window would spend minutes on, made where there is time and no device.

One folder, build/gpu, with the compiled module for another Python (CPython 3.12) and another machine's device (sm_90),
and Triton's compiled kernels in the form of its cache. Triton takes those where its version, the kernels' source and
their options are the same, wherever the folder lies; all else is compiled there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benches.gpu import prebuilt
from benches.gpu.facts import commit
from benches.gpu.processes import ROOT, Command, variables

TRITON = "3.6.0"
PACKAGES = (f"triton=={TRITON}", "pybind11>=2.13", "cmake>=3.24", "ninja", "setuptools>=77", "wheel")
WORK = ROOT / "build" / "gpu-work"
MOST = 60 * 10**6  # bytes of the folder: machines that lend a device take no more along
NEEDED = (".json", ".cubin", ".so")  # of a kernel in the cache; what it was made from stays here


def call(words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """Runs a command in the source folder; ends the program where it fails."""
    command = Command(tuple(map(str, words)), environment or {})
    print(f"$ {command}", flush=True)
    done = subprocess.run(command.words, cwd=ROOT, env=variables(command), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"prebuild: {command.words[0]} ended with {done.returncode}")
    return done.stdout


def environment(python: str) -> Path:
    """An environment of that Python with Triton and what builds the module, kept between runs; its interpreter."""
    folder = WORK / "venv"
    own, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists() or ready.read_text(encoding="utf-8") != "\n".join(PACKAGES):
        call([python, "-m", "venv", "--clear", folder])
        call([own, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES])
        ready.write_text("\n".join(PACKAGES), encoding="utf-8")
    return own


def build_core(python: Path, arch: str) -> Path:
    """The compiled module of that Python."""
    out = WORK / "lib"
    shutil.rmtree(out, ignore_errors=True)
    where = ["--build-lib", out, "--build-temp", WORK / "temp"]
    chosen = {"FASTLORA_CUDA": "ON", "FASTLORA_CUDA_ARCHS": f"{arch}-real"}
    call([python, "setup.py", "-q", "build_ext", *where], chosen)
    (made,) = out.glob("fastlora/_core*.so")
    return made


def compile_kernels(python: Path, arch: str) -> tuple[Path, int]:
    """A cache of Triton's with the kernels of every launch that the windows need, and how many launches there are."""
    launches, cache = WORK / "launches.jsonl", WORK / "triton"
    recorded = call([sys.executable, "-m", "benches.gpu.recorded"], {"OMP_NUM_THREADS": "2"})
    launches.write_text(recorded, encoding="utf-8")
    said = call([python, ROOT / "benches" / "gpu" / "compiled.py", launches, cache, arch])
    found = json.loads(said.splitlines()[-1])
    if found["triton"] != TRITON:
        sys.exit(f"prebuild: Triton {found['triton']} compiled, {TRITON} was asked for")
    return cache, int(found["launches"])


def prune(cache: Path, target: Path) -> int:
    """Copies what is needed to launch the kernels of a cache; how many there are."""
    count = 0
    for folder in sorted(p for p in cache.iterdir() if p.is_dir()):
        kept = [p for p in folder.iterdir() if p.suffix in NEEDED and p.is_file()]
        if not kept:
            continue
        (target / folder.name).mkdir(parents=True)
        for path in kept:
            shutil.copyfile(path, target / folder.name / path.name)
        for group in (target / folder.name).glob(f"{prebuilt.GROUP}*.json"):
            data = json.loads(group.read_text(encoding="utf-8"))
            data["child_paths"] = {n: p for n, p in data["child_paths"].items() if Path(n).suffix in NEEDED}
            group.write_text(json.dumps(data), encoding="utf-8")
            prebuilt.relocate(group)
            count += 1
    return count


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benches.gpu.prebuild", description=__doc__)
    parser.add_argument("--python", required=True, help="the interpreter of the device's version, with its headers")
    parser.add_argument("--arch", default="90", help="compute capability without its point")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    python = environment(arguments.python)
    new = WORK / "new"
    shutil.rmtree(new, ignore_errors=True)
    cache, launches = compile_kernels(python, arguments.arch)
    kernels = prune(cache, new / "triton")
    core = build_core(python, arguments.arch)
    call(["strip", "-o", new / core.name, core])
    about = {"sources": prebuilt.digest(), "arch": arguments.arch, "triton": TRITON, "commit": commit()}
    about |= {"module": core.name, "launches": launches, "kernels": kernels}
    (new / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if (size := size_of(new)) > MOST:
        sys.exit(f"prebuild: the folder takes {size / 1e6:.0f} MB, at most are {MOST / 1e6:.0f}")
    shutil.rmtree(prebuilt.FOLDER, ignore_errors=True)
    new.rename(prebuilt.FOLDER)
    print(f"{prebuilt.FOLDER}: {core.name} for sm_{arguments.arch}, {kernels} Triton kernels, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
