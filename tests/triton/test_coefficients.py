"""The Triton kernels of ``coefficients`` against the formula, in Triton's interpreter and on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlora.backends.triton_coefficients import LARGEST, Plan, _supports
from fastlora.reference.coefficients import Coefficients, coefficients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def empty(g: int, k: int, r: int, w: int, movers: int, turned: bool) -> Coefficients:
    def new(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=DEVICE)

    removal, mixing = new(g, k, movers, r, r), new(g, k, r, w).mT if turned else new(g, k, w, r)
    return Coefficients(new(g, k, w, r), new(g, k), new(g, k), removal.mT if turned else removal, mixing)


def inputs(g: int, k: int, r: int, w: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(g + 10 * k + 100 * r)
    x = torch.randn(g, k, 3 * r + 1, r, generator=generator, dtype=torch.float64)
    projected = torch.einsum("gina,gjnb->gijab", x, x)
    lower = torch.ones(k, k, dtype=torch.bool).tril(-1)
    projected[:, lower] = torch.nan  # blocks that no backend may read
    y = torch.randn(g, k, r, 2 * r, generator=generator, dtype=torch.float64)
    basis = torch.randn(g, k, r, w, generator=generator, dtype=torch.float64)
    basis[0, :, :, w // 2 :] = 0  # fewer directions than columns
    basis[-1] = 0 if g > 1 else basis[-1]  # nothing shared
    scaling, strength = torch.randn(2, g, k, generator=generator, dtype=torch.float64).unbind()
    return tuple(t.contiguous().to(DEVICE) for t in (projected, y @ y.mT, basis, scaling, strength))


@pytest.mark.gpu
@pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or TRITON_INTERPRET=1 as the test below sets it")
@pytest.mark.parametrize("turned", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(("g", "k", "r", "movers"), [(2, 3, 3, 1), (1, 2, 2, 2), (1, 1, 1, 1), (1, 3, 3, 3)])
def test_against_the_formula(g: int, k: int, r: int, movers: int, turned: bool) -> None:
    w = r if movers == 1 else k * r
    given = inputs(g, k, r, w)
    found, wanted = empty(g, k, r, w, movers, turned), empty(g, k, r, w, movers, turned)
    Plan(*given, found).run()
    coefficients(*given, wanted)
    for name, got, expected in zip(Coefficients._fields, found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or TRITON_INTERPRET=1 as the test below sets it")
def test_the_same_bits_alone_and_in_a_batch() -> None:
    given = inputs(2, 2, 3, 3)
    found = empty(2, 2, 3, 3, 1, False)
    Plan(*given, found).run()
    for i in range(2):
        alone = empty(1, 2, 3, 3, 1, False)
        Plan(*(t[i : i + 1].contiguous() for t in given), alone).run()
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, found, strict=True))


def test_what_is_not_taken() -> None:
    r = LARGEST + 1
    given = (torch.zeros(1, 1, 1, r, r).double(), torch.zeros(1, 1, r, r).double(), torch.zeros(1, 1, r, r).double())
    ones = torch.ones(1, 1).double()
    reason = _supports(*given, ones, ones, empty(1, 1, r, r, 1, False))
    assert reason is not None and (f"up to {LARGEST}, got {r}" in reason or "needs a CUDA device" in reason)


@pytest.mark.skipif(RUNS, reason="the tests above ran already")
def test_interpreted() -> None:
    """In a process of its own: the interpreter must be on before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "formula or bits",
        str(Path(__file__)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
