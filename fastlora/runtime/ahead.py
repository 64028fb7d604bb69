"""Torch's kernels, loaded by a thread while Python imports something else."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading

LIBRARIES = {"libtorch_global_deps.so": os.RTLD_NOW | os.RTLD_GLOBAL, "libtorch_cpu.so": os.RTLD_NOW}
"""In the order and the way in which the import of torch loads them."""


def load_ahead() -> threading.Thread | None:
    """Starts to load them and returns at once: they are a third of the import of torch, and need no interpreter. What
    is not there, or cannot be loaded, is left to that import, which says why."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not sys.platform.startswith("linux"):
        return None
    folder = os.path.join(os.path.dirname(spec.origin), "lib")
    paths = [os.path.join(folder, name) for name in LIBRARIES]
    if not all(map(os.path.exists, paths)):
        return None
    load = ctypes.CDLL(None).dlopen  # ctypes' own keeps the interpreter waiting
    load.argtypes, load.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p

    def work() -> None:
        for path, mode in zip(paths, LIBRARIES.values(), strict=True):
            load(os.fsencode(path), mode)

    # Python waits for it at the end: objects of a library must not be destroyed while others are made.
    thread = threading.Thread(target=work)
    thread.start()
    return thread
