"""``coefficients`` on the CUDA kernel against the formula."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import torch
from builders import gaussian
from tolerances import FLOAT64
from torch import Tensor

from fastlora.backends import cuda
from fastlora.ops.coefficients import PartCoefficients, fill

# groups, k, r, movers: one of everything, odd sizes, more adapters than warps, the mean chain's width k·r
SHAPES = [(1, 1, 1, 1), (3, 3, 5, 1), (2, 2, 4, 2), (1, 11, 3, 1), (2, 3, 3, 3), (1, 2, 17, 1)]


def inputs(g: int, k: int, r: int, w: int) -> tuple[Tensor, ...]:
    x, y = gaussian(g, k, 2 * r + 1, r, seed=g + k).double(), gaussian(g, k, r, 2 * r, seed=r).double()
    projected = torch.einsum("gina,gjnb->gijab", x, x)
    projected[:, torch.ones(k, k, dtype=torch.bool).tril(-1)] = torch.nan  # blocks that are not read
    basis = gaussian(g, k, r, w, seed=w).double()
    basis[0, :, :, w // 2 :] = 0  # fewer directions than columns
    if g > 1:
        basis[-1] = 0  # nothing shared
    scaling, strength = gaussian(2, g, k, seed=7).double().unbind()
    return tuple(t.contiguous() for t in (projected, y @ y.mT, basis, scaling, strength))


def results(g: int, k: int, r: int, w: int, movers: int, turned: bool) -> PartCoefficients:
    def new(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64)

    removal, mixing = new(g, k, movers, r, r), new(g, k, r, w).mT if turned else new(g, k, w, r)
    return PartCoefficients(new(g, k, w, r), new(g, k), new(g, k), removal.mT if turned else removal, mixing)


def run(given: tuple[Tensor, ...], out: PartCoefficients) -> PartCoefficients:
    assert cuda.KERNELS["coefficients"].supports(*given, out) is None
    cuda.PreparedCoefficients(*given, out).run()
    return out


@pytest.mark.usefixtures("on_emulator")
@pytest.mark.parametrize("turned", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(("g", "k", "r", "movers"), SHAPES)
def test_against_the_formula(g: int, k: int, r: int, movers: int, turned: bool) -> None:
    w = r if movers == 1 else k * r
    given, wanted = inputs(g, k, r, w), results(g, k, r, w, movers, turned)
    fill(*given, wanted)
    found = run(given, results(g, k, r, w, movers, turned))
    for name, x, y in zip(PartCoefficients._fields, found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT64, atol=FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("on_emulator")
def test_the_same_bits_alone_and_in_a_batch() -> None:
    given = inputs(4, 3, 6, 6)
    whole = run(given, results(4, 3, 6, 6, 1, False))
    for i in range(4):
        alone = run(tuple(t[i : i + 1] for t in given), results(1, 3, 6, 6, 1, False))
        assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, whole, strict=True))


def test_every_barrier_is_needed(emulator: Any) -> None:
    """Of the block: the norms of all adapters. Of a warp: H."""
    given, out = inputs(1, 3, 5, 5), results(1, 3, 5, 5, 1, False)
    with emulation.emulated(emulator):
        for of_warp in (False, True):
            assert emulation.barriers_not_missed(emulator, lambda: run(given, out), of_warp) == (1, [])


def test_what_is_not_taken(emulator: Any) -> None:
    given, out = inputs(1, 2, 3, 3), results(1, 2, 3, 3, 1, False)
    supports = cuda.KERNELS["coefficients"].supports
    with emulation.emulated(emulator):
        assert "float64, got torch.float32" in str(supports(*given[:4], given[4].float(), out))
        assert "contiguous" in str(supports(given[0].mT, *given[1:], out))
        assert "a tensor is on meta" in str(supports(*given[:4], given[4].to("meta"), out))
