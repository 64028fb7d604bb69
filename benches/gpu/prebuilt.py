"""What ``make gpu-prebuild`` made for a device's machine: the compiled module, and Triton's compiled kernels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from benches.gpu.processes import ROOT

FOLDER = ROOT / "build" / "gpu"
CACHE = ROOT / "build" / "gpu-cache"
"""Where Triton reads and writes; ``TRITON_CACHE_DIR`` of all that the windows start."""
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")
GROUP = "__grp__"


def suffix() -> str:
    """Of extension modules of this Python on this platform."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def digest() -> str:
    """Of everything that the compiled module is made of."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]:
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def about() -> dict[str, Any]:
    """What was prepared: ``sources``, ``arch``, ``triton``."""
    try:
        found = json.loads((FOLDER / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def core() -> tuple[Path | None, str]:
    """The prepared module for this Python and these sources, or ``None`` and why there is none."""
    path = FOLDER / f"_core{suffix()}"
    if not FOLDER.is_dir():
        return None, "nothing was prepared"
    if not path.exists():
        return None, f"nothing was prepared for {suffix()}"
    if about().get("sources") != digest():
        return None, "what was prepared is of other sources"
    return path, ""


def unpack() -> int:
    """Puts the prepared kernels where Triton looks for them; returns how many there are."""
    CACHE.mkdir(parents=True, exist_ok=True)
    source = FOLDER / "triton"
    if source.is_dir():
        shutil.copytree(source, CACHE, dirs_exist_ok=True)
        for path in CACHE.glob(f"*/{GROUP}*.json"):
            relocate(path)
    return len(kernels())


def relocate(group: Path) -> None:
    """Names the files of a kernel where they are now: Triton writes down whole paths."""
    data = json.loads(group.read_text(encoding="utf-8"))
    data["child_paths"] = {name: str(group.parent / name) for name in data["child_paths"]}
    new = group.with_suffix(".new")
    new.write_text(json.dumps(data), encoding="utf-8")
    os.replace(new, group)


def kernels() -> set[str]:
    """Keys of the kernels in Triton's cache."""
    return {path.parent.name for path in CACHE.glob(f"*/{GROUP}*.json")}
