"""``python benches/gpu/compiled.py LAUNCHES FOLDER ARCHITECTURE``: recorded launches compiled into a cache of Triton's.

Needs Triton and no torch, no device and no driver: arguments are stand-ins that have what the just-in-time compiler
looks at. It goes its own way as on a device, so that it finds there what was put here.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DTYPES = {
    "i8": "int8", "i32": "int32", "i64": "int64", "u8": "uint8", "fp16": "float16", "bf16": "bfloat16",
    "fp32": "float32", "fp64": "float64", "i1": "bool",
}  # fmt: skip


class Dtype:
    """A dtype of torch's by name."""

    _known: dict[str, Dtype] = {}  # noqa: RUF012

    def __new__(cls, name: str) -> Dtype:
        if name not in cls._known:
            cls._known[name] = super().__new__(cls)
            cls._known[name].name = name
        return cls._known[name]

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


class Pointer:
    """A tensor as the compiler sees it: a dtype, and whether its address is a multiple of 16."""

    def __init__(self, name: str, aligned: bool) -> None:
        self.dtype, self._address = Dtype(DTYPES[name]), 0 if aligned else 8

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


class Driver:
    """What the just-in-time compiler asks a driver that launches nothing."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher

        self._target, self.launcher_cls = GPUTarget("cuda", architecture, 32), CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def compile_launch(row: dict[str, Any]) -> Any:
    """Compiles the kernel of one launch, with the launcher that it is started by."""
    import triton.language as tl

    kernel = getattr(importlib.import_module(row["module"]), row["kernel"])
    arguments = [Pointer(*x) if isinstance(x, list) else x for x in row["arguments"]]
    constants = {k: tl.dtype(v["dtype"]) if isinstance(v, dict) else v for k, v in row["constants"].items()}
    return kernel.run(
        *arguments, **constants, grid=(1,), warmup=True, num_warps=row["warps"], num_stages=row["stages"],
        enable_fp_fusion=False,
    )  # fmt: skip


def write_driver(folder: Path) -> Path:
    """A library with the name of CUDA's driver, for linking where there is none: functions that nobody calls."""
    from triton.backends.nvidia import driver

    sources = [path.read_text(encoding="utf-8") for path in Path(driver.__file__).parent.glob("driver.*")]
    names = sorted({name for text in sources for name in re.findall(r"\bcu[A-Z]\w*(?=\()", text)})
    code, library = folder / "driver.c", folder / "libcuda.so.1"
    code.write_text("\n".join(f"void {name}(void) {{}}" for name in names), encoding="utf-8")
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", code, "-o", library], check=True)
    return library


def main(launches: Path, folder: Path, architecture: int) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import triton
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import driver

    rows = [json.loads(line) for line in launches.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        library = write_driver(Path(temporary))
        os.environ["TRITON_LIBCUDA_PATH"] = temporary
        ctypes.CDLL(str(library))  # before modules that need a library of this name
        own = Driver(architecture)
        driver.set_active(own)
        CudaUtils()  # the module that loads kernels
        for row in rows:
            made = compile_launch(row)
            own.launcher_cls(made.src, made.metadata)
    print(json.dumps({"triton": triton.__version__, "launches": len(rows)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
