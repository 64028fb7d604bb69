"""The console script."""

from __future__ import annotations

import contextlib
import importlib
import sys

from fastlora.runtime import signals
from fastlora.runtime.ahead import load_ahead

LEAN = ("overlap", "inspect", "decompose")
"""The commands that import torch without what only its compilers need (:mod:`fastlora.runtime.lean`): small ones wait
for that import more than for their work."""

COMPILED = (
    *("zlib", "_bz2", "_lzma", "_opcode", "fcntl", "_posixsubprocess", "select", "math", "_datetime", "_uuid"),
    *("_heapq", "_json", "_bisect", "_csv", "_hashlib", "_blake2", "_random", "_sha512", "_socket", "_decimal"),
    *("_contextvars", "_zoneinfo", "binascii", "array", "pydantic_core"),
)
"""What the command line imports of libraries. The system loads one library at a time: they come before a large one."""


def entry() -> None:
    """:func:`fastlora.cli.app.entry`, which takes a tenth of a second to import. Meanwhile torch's kernels are loaded,
    if they will be needed, and signals wait until the command can say that it was interrupted."""
    signals.hold()
    arguments = sys.argv[1:]
    if arguments and arguments[0] in LEAN and not {"-h", "--help"} & set(arguments):
        for name in COMPILED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        load_ahead()
    from fastlora.cli.app import entry as run

    run()
