"""The package's kernels: launched for what the stand-in checks, and done by the emulator and Triton's interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import streams
import triton
import triton.language
from aten import is_there, on_host
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import tritonkernels
from fastlora import _core
from fastlora.backends import cuda

sys.path.append(str(Path(__file__).resolve().parents[2] / "emulated"))


MODULES = sorted(m.name for m in pkgutil.iter_modules(tritonkernels.__path__))


@functools.cache
def _emulator() -> Any:
    import emulation

    module = emulation.build()
    module.set_shared_limit(emulation.SHARED_LIMIT)
    return module


class _LaunchedAndEmulated:
    """The compiled module; what its kernels would write, the emulator writes in the order of the stream."""

    def __getattr__(self, name: str) -> Any:
        launched = getattr(_core, name)
        if name not in ("cuda_eigh", "cuda_svd", "cuda_chain", "cuda_coefficients"):
            return launched
        emulated: Callable[..., int] = getattr(_emulator(), name)

        def call(*arguments: Any, **options: Any) -> int:
            error: int = launched(*arguments, **options)
            if not error:
                streams.enqueue(lambda: _require_done(name, emulated(*arguments, **options)), stream=options["stream"])
            return error

        return call


def _require_done(name: str, error: int) -> None:
    if error:
        raise RuntimeError(f"{name}: the emulator returned {error}")


def _interpreted_copy() -> dict[str, InterpretedFunction]:
    """All Triton kernels by name, from a second copy of their modules that was imported for the interpreter."""
    own = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "tritonkernels"}
    for name in own:
        del sys.modules[name]
    triton.knobs.runtime.interpret = True
    try:
        copies = [importlib.import_module(f"tritonkernels.{name}") for name in MODULES]
    finally:
        triton.knobs.runtime.interpret = False
        for name in [n for n in sys.modules if n.split(".")[0] == "tritonkernels"]:
            del sys.modules[name]
        sys.modules.update(own)
    # Functions of Triton's own library were decorated for the compiler.
    JITFunction.__call__ = lambda self, *arguments, **options: InterpretedFunction(self.fn)(*arguments, **options)
    return {k: v for m in copies for k, v in vars(m).items() if isinstance(v, InterpretedFunction)}


def _fma(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Rounded once, as on a device. The interpreter of Triton 3.6 also rounds the product."""
    operands = np.broadcast_arrays(x.data, y.data, z.data)
    dtype, shape = z.data.dtype, operands[0].shape
    arrays = [*(np.ascontiguousarray(o, dtype) for o in operands), np.empty(shape, dtype)]
    fused = getattr(ctypes.CDLL("libcuda.so.1"), f"rehearsal_fma_{dtype}")
    fused(ctypes.c_long(arrays[-1].size), *(ctypes.c_void_p(a.ctypes.data) for a in arrays))
    return TensorHandle(arrays[-1], z.dtype.scalar)


class _Language:
    """Triton's language as the compiler needs it; the interpreter puts its own functions there."""

    def __init__(self) -> None:
        modules = [m for n, m in sys.modules.items() if n.startswith("triton.language")]
        classes = [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__[:6] == "triton"]
        self._before: list[tuple[ModuleType | type, dict[str, Any]]] = [
            (o, dict(vars(o))) for o in (*modules, *classes)
        ]

    def restore(self) -> None:
        for owner, before in self._before:
            for name, value in before.items():
                if vars(owner).get(name) is not value and name not in ("__dict__", "__weakref__"):
                    setattr(owner, name, value)
            for name in vars(owner).keys() - before.keys() - {"interpreter_semantic"}:  # rewritten functions need that
                if not isinstance(vars(owner)[name], ModuleType):  # a part of it that somebody imported meanwhile
                    delattr(owner, name)


_installed = contextlib.ExitStack()  # for as long as the process runs


def install() -> None:
    from tritonkernels import launch

    for name in MODULES:
        importlib.import_module(f"tritonkernels.{name}")
    _installed.enter_context(cuda.use_module(_LaunchedAndEmulated()))
    InterpreterBuilder.create_fma = _fma
    interpreted, language, lock = _interpreted_copy(), _Language(), threading.Lock()
    real = launch.Launch.run

    def run(self: Any) -> None:
        with lock:  # the compiler and the interpreter want different functions in Triton's language
            real(self)
        kernel, programs = interpreted[self.kernel.fn.__name__], self.programs
        options = {**self.constants, "num_warps": self.warps, "num_stages": self.stages}
        arguments = [on_host(x) if is_there(x) else x for x in self.arguments]

        def work() -> None:
            with lock:
                try:
                    kernel[(programs,)](*arguments, **options)
                finally:
                    language.restore()

        streams.enqueue(work, captured=self)

    launch.Launch.run = run
