"""Marks of tests that need compiled kernels: a pure-Python package, where plain torch computes, skips them."""

from __future__ import annotations

import pytest

from fastlora.backends import cpu

COMPILED = cpu.unavailable() is None
ON_HOST = [*(["cpu"] if COMPILED else []), "torch", "reference"]
"""Backends that compute on the CPU here."""

needs_kernels = pytest.mark.skipif(not COMPILED, reason="needs compiled kernels, which it is about")
needs_same_bits = pytest.mark.skipif(
    not COMPILED, reason="needs compiled kernels: torch's bits depend on the batch and the number of threads"
)
