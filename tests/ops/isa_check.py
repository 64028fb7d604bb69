"""A compact accuracy check of one solver, run once per instruction set in a process of its own.

The instruction set is chosen when the process first uses a kernel, so a test cannot switch it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import spectra
import torch

import fastlora as fl

ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 48, 65, 97]


def check_eigh() -> float:
    worst = 0.0
    for dtype in spectra.DTYPES:
        for n in SIZES:
            for name, a in spectra.symmetric(n, dtype):
                values, vectors = fl.ops.eigh(a)
                ratio = max(spectra.eigh_ratios(a, values, vectors).values())
                assert ratio <= spectra.RATIO_LIMIT, f"n={n} {dtype} {name}: {ratio}"
                alone = fl.ops.eigh(a[4])
                assert torch.equal(values[4], alone[0]) and torch.equal(vectors[4], alone[1]), f"n={n} {name}"
                worst = max(worst, ratio)
    return worst


def check_svd() -> float:
    worst = 0.0
    for dtype in spectra.DTYPES:
        for n in SIZES:
            for p, q in {(n, n), (n, n // 2 + 1), (n // 3 + 1, n)}:
                for name, a in spectra.rectangular(p, q, dtype):
                    result = fl.ops.svd(a)
                    ratio = max(spectra.svd_ratios(a, *result).values())
                    assert ratio <= spectra.RATIO_LIMIT, f"{p}x{q} {dtype} {name}: {ratio}"
                    for x, alone in zip(result, fl.ops.svd(a[4]), strict=True):
                        assert torch.equal(x[4], alone), f"{p}x{q} {dtype} {name}"
                    worst = max(worst, ratio)
    return worst


CHECKS = {"eigh": check_eigh, "svd": check_svd}


def check_every_isa(op: str) -> None:
    """Runs this file under every instruction set that the processor has; fails with what it printed."""
    ran = []
    for isa in ISAS:
        done = subprocess.run(
            [sys.executable, __file__, op],
            env=os.environ | {"FASTLORA_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
        )
        if "this processor does not run it" in done.stderr or "no such instruction set" in done.stderr:
            continue
        assert done.returncode == 0, f"{isa}:\n{done.stdout}{done.stderr}"
        assert done.stdout.startswith(f"{op} {isa}"), done.stdout
        ran.append(isa)
    assert "baseline" in ran


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from fastlora.backends import cpu

    with fl.use_backend("cpu"):
        torch.set_num_threads(2)
        print(f"{sys.argv[1]} {cpu.isa()}: worst ratio {CHECKS[sys.argv[1]]():.2f}")
