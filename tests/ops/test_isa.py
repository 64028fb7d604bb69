"""gram, combine and chain under every instruction set that the processor runs, one process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import needs_kernels
from isa_check import ISAS

SELECTED = "(definition or special or every_finite or writes_ragged or test_dense) and not reference"
TESTS = Path(__file__).parent


@pytest.mark.parametrize("isa", ISAS)
@needs_kernels
def test_every_instruction_set(isa: str) -> None:
    environment = os.environ | {"FASTLORA_ISA": isa, "FASTLORA_BACKEND": "cpu"}
    which = [sys.executable, "-c", "from fastlora.backends import cpu; print(cpu.isa())"]
    found = subprocess.run(which, env=environment, capture_output=True, text=True)
    if found.returncode and ("does not run it" in found.stderr or "no such instruction set" in found.stderr):
        pytest.skip(found.stderr.strip().splitlines()[-1])
    assert found.stdout.strip() == isa, found.stderr
    ops = ("gram", "combine", "chain", "similarity", "add_products", "tucker", "difference_products")
    files = [str(TESTS / f"test_{op}.py") for op in ops]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED, *files]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=TESTS.parent.parent)
    assert done.returncode == 0, done.stdout[-3000:]
